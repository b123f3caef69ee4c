"""Corpora opened for reading: the shards of one corpus as one run of tokens, cut in a training and a held-out part.

shards.py says what a sound shard is, data.py asks for windows, chunks.py fetches what is in object storage. A part holds
checked headers and nothing that is open, so that it can be sent to another process. Megatron's readers are opened when
they are needed, OPEN_SHARDS at a time, and megatron is imported late, because that takes seconds. The surprise: a view
of a shard that was closed is a crash and no exception, so whoever reads holds the shard and copies.
"""

import atexit
import contextlib
import hashlib
import logging
import re
import threading
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale import remote_shards
from ted_scale.chunks import chunks_of
from ted_scale.errors import UserError
from ted_scale.object_store import is_remote
from ted_scale.shards import (
    SHARD_NUMBER,
    Files,
    ShardIndex,
    check_vocabulary,
    expand,
    out_of_order,
    out_of_vocabulary,
    read_index,
)
from ted_scale.staging import manifest_path, read_manifest

QUIET = threading.RLock()
OPEN_SHARDS = 128  # three descriptors and two mappings each, and 1024 descriptors are a common limit


class Mapped(NamedTuple):
    """Megatron's readers of a shard; `tokens` is None where its .bin is in object storage."""

    borders: object
    tokens: object


@lru_cache(maxsize=OPEN_SHARDS)
def mapped(files: Files) -> Mapped:
    indexed = megatron_indexed()
    if files.remote_bin:
        return Mapped(indexed._IndexReader(str(files.idx), multimodal=False), None)
    dataset = indexed.IndexedDataset(files.prefix, mmap=True)
    return Mapped(dataset.index, dataset.bin_reader)


atexit.register(mapped.cache_clear)  # multi-storage-client's files complain of being closed any later


class Shard:
    """One shard while it is read: holding it keeps its mappings."""

    def __init__(self, index: ShardIndex):
        self.index, (self.borders, self.tokens) = index, mapped(index.files)

    def document_start(self, document: int) -> int:
        """First token of a document; the number of tokens for the one behind the last."""
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

        def pointer(document: int):  # document_start in bytes with nothing looked up twice: every window asks
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


class Part(NamedTuple):
    """The tokens [start, stop) of a corpus, which is its shards one after another."""

    number: int
    name: str
    shards: tuple[ShardIndex, ...]
    starts: tuple[int, ...]  # first token of each shard in the corpus
    start: int
    stop: int
    stream: object  # the run file's data.stream

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def content(self) -> str:
        """Tells these tokens from others, as far as indices and sizes do."""
        made = [(i.tokens, i.files.bin_bytes, (i.sidecar or {}).get("idx_sha256")) for i in self.shards]
        return hashlib.sha256(repr((self.start, self.stop, made)).encode()).hexdigest()[:16]

    def _ranges(self, offset: int, count: int):
        """(shard, its first token in the corpus, first and last+1 token in the shard) of each shard that is touched."""
        begin = self.start + offset
        end = begin + count
        for s in range(bisect_right(self.starts, begin) - 1, bisect_left(self.starts, end)):
            base = self.starts[s]
            yield self.shards[s], base, max(begin - base, 0), min(end - base, self.shards[s].tokens)

    def ahead(self, offset: int, count: int) -> None:
        """These tokens will be read soon; nothing to do for those on disk."""
        for index, _, low, high in self._ranges(offset, count):
            if thing := index.files.remote_bin:
                size = index.dtype.itemsize
                chunks_of(self.stream).ahead(thing, low * size, high * size, self.name)

    def read(self, offset: int, count: int, vocab_size: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """`count` tokens from `offset` of this part as int64, and where among them documents start."""
        begin, chunks, starts = self.start + offset, [], []
        for index, base, low, high in self._ranges(offset, count):
            shard = Shard(index)
            chunk = self._read(shard, low, high)
            self._check(chunk, index, vocab_size)
            chunks.append(chunk.astype(numpy.int64))
            starts.append(shard.document_starts(low, high) + (base - begin))
        return _joined(chunks), _joined(starts)

    def begins(self, offset: int, count: int) -> numpy.ndarray:
        """Where documents start among these tokens, from the indices alone."""
        ranges, begin = self._ranges(offset, count), self.start + offset
        return _joined([Shard(index).document_starts(low, high) + (base - begin) for index, base, low, high in ranges])

    def _read(self, shard: Shard, low: int, high: int) -> numpy.ndarray:
        dtype = shard.index.dtype
        if thing := shard.index.files.remote_bin:
            content = chunks_of(self.stream).read(thing, low * dtype.itemsize, high * dtype.itemsize, self.name)
            return numpy.frombuffer(content, dtype)
        return shard.tokens.read(dtype=dtype.type, count=high - low, offset=low * dtype.itemsize)

    def _check(self, chunk: numpy.ndarray, index: ShardIndex, vocab_size: int) -> None:
        for token in (int(chunk.max(initial=0)), int(chunk.min(initial=0))):
            if not 0 <= token < vocab_size:
                raise out_of_vocabulary(f"{index.prefix} of {self.name}", token, vocab_size)


def _joined(arrays: list[numpy.ndarray]) -> numpy.ndarray:
    return arrays[0] if len(arrays) == 1 else numpy.concatenate(arrays)


def prefixes_of(path: str, stream) -> list[str]:
    """The shards that a corpus's path means, by name."""
    return (
        list(remote_shards.listing(path, remote_shards.opening_patience_s(stream))) if is_remote(path) else expand(path)
    )


def read_shards(path: str, stream) -> list[ShardIndex]:
    """Checked headers of the shards that a corpus's path means, on disk or in object storage."""
    return remote_shards.read_corpus(path, stream) if is_remote(path) else [read_index(p) for p in expand(path)]


def read_corpus(path: str, stream) -> list[ShardIndex]:
    """The same, with no shard lost."""
    indices = read_shards(path, stream)
    refuse_lost_shards(path, {index.prefix for index in indices}, stream)
    return indices


def refuse_lost_shards(path: str, prefixes: set[str], stream) -> None:
    """What a manifest lists is all there, unless one shard was asked for by its name."""
    if prefixes == {re.sub(r"\.(bin|idx)$", "", path)}:
        return
    for name, file in manifest_files(path, prefixes, stream).items():
        if lost := [p for p in listed_shards(name, file, file.stat().st_mtime_ns) if p not in prefixes]:
            raise UserError(
                f"corpus {path} must hold the shards that {name}.manifest.json lists, but {lost[0]} is missing; copy it again"
            )


@lru_cache(maxsize=64)
def listed_shards(name: str, file: Path, _written: int) -> tuple[str, ...]:
    """The shards of an output that this project wrote; read once a process."""
    manifest = read_manifest(file, f"{name}.manifest.json")
    return tuple(name[: name.rfind("/") + 1] + shard["name"] for shard in manifest["shards"])


def manifest_files(path: str, prefixes: Iterable[str], stream) -> dict[str, Path]:
    """The manifests of the outputs that `path` means, by output, on local disk; other tools write none."""
    if is_remote(path):
        return remote_shards.manifests(path, stream)
    names = {SHARD_NUMBER.sub("", prefix) for prefix in prefixes}
    return {name: manifest_path(name) for name in sorted(names) if manifest_path(name).exists()}


def open_part(number: int, corpus, vocab_size: int, training: bool, stream) -> Part:
    """Corpus `number` of the run file, checked: the tokens to train on, or the held-out ones behind them."""
    name = f"data.corpora[{number}] ({corpus.path})"
    indices = read_corpus(corpus.path, stream)
    for index in indices:
        check_vocabulary(index, vocab_size)
    starts = tuple(accumulate((index.tokens for index in indices), initial=0))
    border = _border(indices, starts, corpus.validation)
    start, stop = (0, border) if training else (border, starts[-1])
    return Part(number, name, tuple(indices), starts[:-1], start, stop, stream)


def _border(indices: list[ShardIndex], starts: tuple[int, ...], fraction: float) -> int:
    """Where the held-out tokens begin: at the document start nearest to their share, or, where whole documents would take
    more than twice that share, within a document. So what is cut was always held out by whole documents, too."""
    total = starts[-1]
    if not fraction:
        return total
    target = round(total * (1 - fraction))
    s = min(bisect_right(starts, target), len(indices)) - 1
    shard = Shard(indices[s])
    document = shard.first_document(target - starts[s])
    near = range(max(0, document - 1), min(shard.index.documents, document + 1) + 1)
    borders = {starts[s] + shard.document_start(d) for d in near} - {0, total}
    nearest = min(borders, key=lambda border: abs(border - target), default=0)
    return nearest if nearest and total - nearest <= 2 * (total - target) else target


def megatron_indexed():
    """megatron's module of reader and writer, imported late: it takes seconds."""
    with without_noise():
        from megatron.core.datasets import indexed_dataset
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # it has a word on every shard
    warnings.filterwarnings("ignore", "Could not determine rank")
    return indexed_dataset


@contextlib.contextmanager
def without_noise():
    """megatron warns of packages that nothing here needs. What is silenced is the process's, so one thread at a time."""
    with QUIET:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
