"""Which tokens a step reads: order and blend of corpora, windows by position, documents kept apart, batches read ahead."""
