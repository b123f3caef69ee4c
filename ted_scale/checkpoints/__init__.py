"""A run's checkpoints: what one holds, which one is the newest whole one, and how they are written, copied and read."""
