"""The run file: its sections with the type and default of every key, how it is read, and how two run files are compared.

Every number of a run is set here and nowhere else. ds_configs/*.json only say how ZeRO shards, offloads and communicates.
plan.py computes what follows from a run (pairs, accumulation, parameter counts).
"""
