"""The method: teacher and student in a step, filters and pairs, token normalization, stages, and their FLOPs and memory."""
