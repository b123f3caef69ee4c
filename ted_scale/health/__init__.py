"""Whether a step's numbers are good, and what follows if they are not: skip the step, go back, or stop the run."""
