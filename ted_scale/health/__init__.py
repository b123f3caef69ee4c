"""Checks the numbers of a step. If they are bad, the run skips the step, goes back to a checkpoint, or stops."""
