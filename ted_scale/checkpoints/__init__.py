"""A run's checkpoints: what is in one, which one is the newest whole one, and how they are written, copied and read."""
