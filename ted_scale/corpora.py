"""Corpora opened for reading: the shards of one corpus as one run of tokens, cut in a training and a held-out part.

shards.py says what a sound shard is, data.py asks for windows. Tokens are mapped by megatron's IndexedDataset, which is
imported late, because that takes seconds. The surprise: document borders are found by bisection in the mapped index;
numpy.searchsorted would copy it whole at every call, since megatron's arrays are not aligned in the file.
"""

import contextlib
import logging
import resource
import warnings
from bisect import bisect_left, bisect_right
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale.errors import UserError
from ted_scale.shards import ShardIndex, check_vocabulary, expand, out_of_vocabulary, read_index


class Shard(NamedTuple):
    """An open shard: its checked header and megatron's memory map."""

    index: ShardIndex
    dataset: object

    def __reduce__(self):
        """Sent to another process, it is opened there."""
        return open_shard, (self.index,)

    def read(self, start: int, stop: int) -> numpy.ndarray:
        dtype = self.index.dtype
        return self.dataset.bin_reader.read(dtype=dtype.type, count=stop - start, offset=start * dtype.itemsize)

    def document_start(self, document: int) -> int:
        """First token of a document; the number of tokens for the one behind the last."""
        sequence = int(self.dataset.document_indices[document])
        if sequence == self.index.sequences:
            return self.index.tokens
        return int(self.dataset.index.sequence_pointers[sequence]) // self.index.dtype.itemsize

    def first_document(self, token: int, least: int = 0) -> int:
        """The first document that starts at `token` or later, and is not before document `least`."""
        borders, pointers = self.dataset.document_indices, self.dataset.index.sequence_pointers
        sequences, itemsize = self.index.sequences, self.index.dtype.itemsize

        def pointer(document: int):  # document_start in bytes with nothing looked up twice: every window asks
            sequence = borders[document]
            return pointers[sequence] if sequence < sequences else self.index.tokens * itemsize

        return bisect_left(range(self.index.documents), token * itemsize, lo=least, key=pointer)

    def document_starts(self, low: int, high: int) -> numpy.ndarray:
        """First tokens of the documents that start in [low, high), which ends with the shard at the latest."""
        first = self.first_document(low)
        sequences = self.dataset.document_indices[first : self.first_document(high, first)]
        return self.dataset.index.sequence_pointers[sequences] // self.index.dtype.itemsize


class Part(NamedTuple):
    """The tokens [start, stop) of a corpus, which is its shards one after another."""

    number: int
    name: str
    shards: tuple[Shard, ...]
    starts: tuple[int, ...]  # first token of each shard in the corpus
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def read(self, offset: int, count: int, vocab_size: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """`count` tokens from `offset` of this part as int64, and where among them documents start."""
        chunks, starts = [], []
        begin = self.start + offset
        end = begin + count
        for s in range(bisect_right(self.starts, begin) - 1, bisect_left(self.starts, end)):
            shard, base = self.shards[s], self.starts[s]
            low, high = max(begin - base, 0), min(end - base, shard.index.tokens)
            chunk = shard.read(low, high)
            self._check(chunk, shard, vocab_size)
            chunks.append(chunk.astype(numpy.int64))
            starts.append(shard.document_starts(low, high) + (base - begin))
        return _joined(chunks), _joined(starts)

    def _check(self, chunk: numpy.ndarray, shard: Shard, vocab_size: int) -> None:
        for token in (int(chunk.max(initial=0)), int(chunk.min(initial=0))):
            if not 0 <= token < vocab_size:
                raise out_of_vocabulary(f"{shard.index.prefix} of {self.name}", token, vocab_size)


def _joined(arrays: list[numpy.ndarray]) -> numpy.ndarray:
    return arrays[0] if len(arrays) == 1 else numpy.concatenate(arrays)


def open_part(number: int, corpus, vocab_size: int, training: bool) -> Part:
    """Corpus `number` of the run file, checked: the documents to train on, or the held-out ones behind them."""
    name = f"data.corpora[{number}] ({corpus.path})"
    indices = [read_index(prefix) for prefix in expand(corpus.path)]
    for index in indices:
        check_vocabulary(index, vocab_size)
    shards = _open_shards(indices)
    starts = tuple(accumulate((index.tokens for index in indices), initial=0))
    border = _border(shards, starts, corpus.validation, name)
    start, stop = (0, border) if training else (border, starts[-1])
    return Part(number, name, shards, starts[:-1], start, stop)


def _border(shards: tuple[Shard, ...], starts: tuple[int, ...], fraction: float, name: str) -> int:
    """The document start nearest to where the held-out fraction begins, with a document left on either side."""
    total = starts[-1]
    if not fraction:
        return total
    target = round(total * (1 - fraction))
    s = min(bisect_right(starts, target), len(shards)) - 1
    document = shards[s].first_document(target - starts[s])
    near = range(max(0, document - 1), min(shards[s].index.documents, document + 1) + 1)
    borders = {starts[s] + shards[s].document_start(d) for d in near} - {0, total}
    if not borders:
        raise UserError(
            f"{name} must hold two documents or more to hold some out, but holds one; set its validation to 0"
        )
    return min(borders, key=lambda border: abs(border - target))


def _open_shards(indices: list[ShardIndex]) -> tuple[Shard, ...]:
    _allow_descriptors(3 * len(indices))
    return tuple(open_shard(index) for index in indices)


def open_shard(index: ShardIndex) -> Shard:
    dataset = megatron_indexed().IndexedDataset
    with without_noise():
        return Shard(index, dataset(index.prefix, mmap=True))


def _allow_descriptors(more: int) -> None:
    """Raise the soft limit: an open shard keeps three descriptors, and 1024 is a common limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(list(Path("/dev/fd").iterdir())) + more + 512
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def megatron_indexed():
    """megatron's module of reader and writer, imported late: it takes seconds."""
    with without_noise():
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@contextlib.contextmanager
def without_noise():
    """megatron warns of packages that nothing here needs, and of a rank that a process without ranks does not have."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
