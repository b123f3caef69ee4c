"""megatron-core's readers of a shard, opened when they are needed, OPEN_SHARDS at a time.

megatron is imported late, because that takes seconds. Reading a view of a closed shard crashes the process and raises
nothing, so a reader holds its Shard and copies.
"""

import atexit
import contextlib
import logging
import threading
import warnings
from bisect import bisect_left
from functools import lru_cache
from typing import Any, NamedTuple

import numpy

from ted_scale.corpora.shards import Files, ShardIndex, out_of_order

QUIET = threading.RLock()


OPEN_SHARDS = 128  # three descriptors and two mappings each, and 1024 descriptors are a common limit


class Mapped(NamedTuple):
    """Megatron's readers of a shard; `tokens` is None where its .bin is in object storage."""

    borders: Any
    tokens: Any


@lru_cache(maxsize=OPEN_SHARDS)
def mapped(files: Files) -> Mapped:
    indexed = megatron_indexed()
    if files.remote_bin:
        return Mapped(indexed._IndexReader(str(files.idx), multimodal=False), None)
    dataset = indexed.IndexedDataset(files.prefix, mmap=True)
    return Mapped(dataset.index, dataset.bin_reader)


atexit.register(mapped.cache_clear)  # later, multi-storage-client's files raise when they are closed


class Shard:
    """One shard while it is read. Holding it keeps its mappings open."""

    def __init__(self, index: ShardIndex):
        self.index, (self.borders, self.tokens) = index, mapped(index.files)

    def document_start(self, document: int) -> int:
        """First token of a document; for the document after the last one, the number of tokens."""
        sequence = int(self.borders.document_indices[document])
        if sequence == self.index.sequences:
            return self.index.tokens
        inside = 0 <= sequence < self.index.sequences
        start = int(self.borders.sequence_pointers[sequence]) // self.index.dtype.itemsize if inside else -1
        if not 0 <= start <= self.index.tokens:
            raise out_of_order(self.index.prefix + ".idx")
        return start

    def first_document(self, token: int, least: int = 0) -> int:
        """The first document that starts at `token` or later, and is not before document `least`; by bisection, because
        numpy.searchsorted would copy the index whole at every call: megatron's arrays are not aligned in the file."""
        borders, pointers = self.borders.document_indices, self.borders.sequence_pointers
        sequences, itemsize = self.index.sequences, self.index.dtype.itemsize

        def pointer(document: int):  # document_start in bytes, looking nothing up twice, because every window calls it
            sequence = borders[document]
            return pointers[sequence] if sequence < sequences else self.index.tokens * itemsize

        try:
            return bisect_left(range(self.index.documents), token * itemsize, lo=least, key=pointer)
        except IndexError:
            raise out_of_order(self.index.prefix + ".idx") from None

    def document_starts(self, low: int, high: int) -> numpy.ndarray:
        """First tokens of the documents that start in [low, high), which ends with the shard at the latest."""
        first = self.first_document(low)
        sequences = self.borders.document_indices[first : self.first_document(high, first)]
        try:
            starts = self.borders.sequence_pointers[sequences] // self.index.dtype.itemsize
        except IndexError:
            raise out_of_order(self.index.prefix + ".idx") from None
        if len(starts) and not low <= starts.min() <= starts.max() < high:
            raise out_of_order(self.index.prefix + ".idx")
        return starts


def megatron_indexed():
    """megatron's module of reader and writer, imported late: it takes seconds."""
    with without_noise():
        from megatron.core.datasets import indexed_dataset
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # it logs something about every shard
    warnings.filterwarnings("ignore", "Could not determine rank")
    return indexed_dataset


@contextlib.contextmanager
def without_noise():
    """megatron warns about packages that are not needed here. Logging is silenced for the process: one thread at a time."""
    with QUIET:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
