"""The method: teacher and student in a step, filters and pairs, what losses are divided by, stages, and their cost."""
