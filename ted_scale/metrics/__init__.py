"""What a run reports: the log, the rows of metrics.jsonl, the console and Weights & Biases."""
