"""Whether a step's numbers are sound, and what happens where they are not: skip, go back, or end the run."""
