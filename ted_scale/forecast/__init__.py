"""What a run will need before it starts: a machine in a few numbers, and the time of a step by terms. Memory is distill/memory.py's."""
