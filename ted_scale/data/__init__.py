"""The data of a step: order and blend of corpora, windows by position, separate documents, batches that are read ahead."""
