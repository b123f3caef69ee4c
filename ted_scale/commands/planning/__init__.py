"""ted-scale plan by parts: the ways to run a run file, the page about them, the table over GPUs, the measurement of a machine."""
