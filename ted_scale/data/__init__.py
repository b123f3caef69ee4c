"""What a step reads: the order and blend of corpora, windows by position, separate documents, batches read ahead."""
