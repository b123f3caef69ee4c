"""A run's checkpoints: what stands in one, which is the newest whole one, how it is written, copied and read."""
