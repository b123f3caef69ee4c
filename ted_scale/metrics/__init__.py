"""What a run tells of itself: the log, rows of metrics.jsonl, the console and Weights & Biases."""
