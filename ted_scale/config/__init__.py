"""The run file's sections, read and compared: every key of a run, its type and its default.

This is the one home of every number of a run. ds_configs/*.json say how ZeRO shards, offloads and communicates, and
nothing else. What follows from a run (pairs, accumulation, parameter counts) is worked out in plan.py.
"""
