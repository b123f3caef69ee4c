"""What a run will take, before it starts: a machine in a few numbers, and the time of a step. Memory is distill/memory.py's."""
