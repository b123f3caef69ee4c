"""Corpora opened for reading: the shards of one corpus as one run of tokens, cut in a training and a held-out part.

shards.py checks shards, stream.py reads windows, chunks.py fetches what is in object storage. Note: a part holds checked
headers and nothing that is open, so that it can be large and be sent to another process; reader.py opens shards when they are
read.
"""

import hashlib
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale.base.errors import UserError, files_at
from ted_scale.config.data import Streaming
from ted_scale.corpora import remote
from ted_scale.corpora.local import SHARD_NUMBER, expand, name_of, names_in
from ted_scale.corpora.output import manifest_path, read_manifest
from ted_scale.corpora.reader import Shard, reading
from ted_scale.corpora.shards import OUTPUT_MANIFEST, ShardIndex, check_vocabulary, out_of_vocabulary, read_indices
from ted_scale.storage.chunks import chunks_of
from ted_scale.storage.objects import is_remote


class Part(NamedTuple):
    """The tokens [start, stop) of a corpus, which is its shards one after another."""

    number: int
    name: str
    shards: tuple[ShardIndex, ...]
    starts: tuple[int, ...]  # first token of each shard in the corpus
    start: int
    stop: int
    stream: Streaming | None  # the run file's data.stream

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def content(self) -> str:
        """A digest that differs for other tokens, as far as indices and sizes differ."""
        made = [(i.tokens, i.files.bin_bytes, i.recorded and i.recorded.idx_sha256) for i in self.shards]
        return hashlib.sha256(repr((self.start, self.stop, made)).encode()).hexdigest()[:16]

    @property
    def listed(self) -> str:
        """A digest that also differs for shards of other names, for other tokens of the same number as far as sidecars tell, and
        for another version of an object."""
        found = [
            (Path(i.prefix).name, i.recorded and i.recorded.bin_sha256, thing and (thing.version, thing.size))
            for i in self.shards
            for thing in [i.files.remote_bin]
        ]
        return hashlib.sha256(repr((self.content, found)).encode()).hexdigest()[:16]

    @property
    def place(self) -> str:
        """The folder that links lead to; '' without links, and for object storage."""
        files = self.shards[0].files
        if files.remote_bin:
            return ""
        given, real = os.path.normpath(Path(files.prefix).absolute().parent), str(Path(files.path(".bin")).parent)
        return "" if given == real else real

    def _ranges(self, offset: int, count: int):
        """(shard, its first token in the corpus, first and last+1 token in the shard) of each shard in the range."""
        begin = self.start + offset
        end = begin + count
        for s in range(bisect_right(self.starts, begin) - 1, bisect_left(self.starts, end)):
            base = self.starts[s]
            yield self.shards[s], base, max(begin - base, 0), min(end - base, self.shards[s].tokens)

    def ahead(self, offset: int, count: int) -> None:
        """These tokens will be read soon: begin to fetch those in object storage."""
        for index, _, low, high in self._ranges(offset, count):
            if thing := index.files.remote_bin:
                size = index.dtype.itemsize
                chunks_of(self.stream).ahead(thing, low * size, high * size, self.name)

    def read(self, offset: int, count: int, vocab_size: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """`count` tokens from `offset` of this part as int64, and where among them documents start."""
        begin, chunks, starts = self.start + offset, [], []
        for index, base, low, high in self._ranges(offset, count):
            chunk, begins = reading(index, Shard.window, low, high)
            if chunk is None:
                chunk = self._fetched(index, low, high)
            self._check(chunk, index, vocab_size)
            chunks.append(chunk.astype(numpy.int64))
            starts.append(begins + (base - begin))
        return _joined(chunks), _joined(starts)

    def begins(self, offset: int, count: int) -> numpy.ndarray:
        """Where documents start among these tokens, from the indices alone."""
        begin, starts = self.start + offset, []
        for index, base, low, high in self._ranges(offset, count):
            starts.append(reading(index, Shard.document_starts, low, high) + (base - begin))
        return _joined(starts)

    def targets(self, offset: int, count: int) -> numpy.ndarray | None:
        """Which of these tokens count; None where all do."""
        found, some = [], False
        for index, _, low, high in self._ranges(offset, count):
            here = reading(index, Shard.targets, low, high)
            some = some or here is not None
            found.append(numpy.ones(high - low, bool) if here is None else here)
        return _joined(found) if some else None

    def _fetched(self, index: ShardIndex, low: int, high: int) -> numpy.ndarray:
        """Tokens [low, high) of a shard in object storage."""
        thing, size = index.files.remote_bin, index.dtype.itemsize
        return numpy.frombuffer(chunks_of(self.stream).read(thing, low * size, high * size, self.name), index.dtype)

    def _check(self, chunk: numpy.ndarray, index: ShardIndex, vocab_size: int) -> None:
        for token in (int(chunk.max(initial=0)), int(chunk.min(initial=0))):
            if not 0 <= token < vocab_size:
                raise out_of_vocabulary(f"{index.prefix} of {self.name}", token, vocab_size)


def _joined(arrays: list[numpy.ndarray]) -> numpy.ndarray:
    return arrays[0] if len(arrays) == 1 else numpy.concatenate(arrays)


def prefixes_of(path: str, stream) -> list[str]:
    """The names of the shards that a corpus's path means."""
    return list(remote.listing(path, remote.opening_patience_s(stream))) if is_remote(path) else expand(path)


def read_shards(path: str, stream) -> list[ShardIndex]:
    """Checked headers of the shards that a corpus's path means, on disk or in object storage."""
    return remote.read_corpus(path, stream) if is_remote(path) else read_indices(expand(path))


def read_corpus(path: str, stream) -> list[ShardIndex]:
    """The same; a shard that its manifest lists and that is missing is refused."""
    with files_at(path):
        indices = read_shards(path, stream)
        refuse_lost_shards(path, {index.prefix for index in indices}, stream)
        return indices


def list_again() -> None:
    """Forget what was listed in object storage. A folder on disk is listed at every opening."""
    remote.listing.cache_clear()
    remote.read_corpus.cache_clear()


def refuse_lost_shards(path: str, prefixes: set[str], stream) -> None:
    """Every shard that a manifest lists must be there, unless the path names a single shard."""
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
        return remote.manifests(path, stream)
    names = {SHARD_NUMBER.sub("", prefix) for prefix in prefixes}
    folders = {name.removesuffix(name_of(name)) for name in names}  # one listing, and not a look for each of many names
    files = (folder + file for folder in folders for file in names_in(Path(folder), (OUTPUT_MANIFEST,)))
    found = sorted(file.removesuffix(OUTPUT_MANIFEST) for file in files)
    return {name: manifest_path(name) for name in found if name in names}


def open_parts(number: int, corpus, vocab_size: int, stream) -> tuple[Part, Part]:
    """Corpus `number` of the run file, listed once and checked: the tokens to train on, and the held-out tokens after them."""
    name = f"data.corpora[{number}] ({corpus.path})"
    indices = read_corpus(corpus.path, stream)
    for index in indices:
        check_vocabulary(index, vocab_size)
    starts = tuple(accumulate((index.tokens for index in indices), initial=0))
    border = _border(indices, starts, corpus.validation)
    training = Part(number, name, tuple(indices), starts[:-1], 0, border, stream)
    return training, training._replace(start=border, stop=starts[-1])


def _border(indices: list[ShardIndex], starts: tuple[int, ...], fraction: float) -> int:
    """Where the held-out tokens begin: at the document start nearest to their share. Where whole documents would take more
    than twice that share, a document is cut at exactly the share."""
    total = starts[-1]
    if fraction in (0, 1):
        return total if fraction == 0 else 0
    target = round(total * (1 - fraction))
    s = min(bisect_right(starts, target), len(indices)) - 1
    near = reading(indices[s], _starts_near, target - starts[s])
    borders = {starts[s] + start for start in near} - {0, total}
    nearest = min(borders, key=lambda border: abs(border - target), default=0)
    return nearest if nearest and total - nearest <= 2 * (total - target) else target


def _starts_near(shard: Shard, token: int) -> list[int]:
    """First tokens of the first document that starts at `token` or later, and of its neighbours."""
    document = shard.first_document(token)
    near = range(max(0, document - 1), min(shard.index.documents, document + 1) + 1)
    return [shard.document_start(d) for d in near]
