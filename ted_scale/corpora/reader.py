"""Shards opened for reading, OPEN_SHARDS at a time: their tokens, and where documents begin, looked up in the .idx in blocks.

Note: nothing is mapped into memory. A page fault on a map holds Python's lock until a file server answers, and then no thread
can say that this rank is alive. os.pread frees the lock (docs/design/0032-listed-once-and-read-without-maps.md).
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy

from ted_scale.base.errors import UserError, files_at
from ted_scale.base.patience import patiently
from ted_scale.corpora.local import STAMP, File, Files, open_file
from ted_scale.corpora.shards import HEADER, ShardIndex, out_of_order

OPEN_SHARDS = 128  # two descriptors each, and 1024 descriptors are a common limit
BLOCK = 512  # documents that are looked up at once: a page of the index

Result = TypeVar("Result")


class Opened(NamedTuple):
    idx: File
    bin: File | None  # None: in object storage


@lru_cache(maxsize=OPEN_SHARDS)
def opened(files: Files) -> Opened:
    return Opened(open_file(files.path(".idx")), None if files.remote_bin else open_file(files.path(".bin")))


def changed(files: Files, stamps: bytes) -> UserError:
    """The sentence about the first file whose stamp is another than when the corpus was listed."""
    pairs = zip(
        (".idx", ".bin"), STAMP.iter_unpack(files.stamps[: len(stamps)]), STAMP.iter_unpack(stamps), strict=True
    )
    ending, (size, time), (size_now, time_now) = next(each for each in pairs if each[1] != each[2])
    times = (f"was written at {numpy.datetime64(t, 'ns')} UTC" for t in (time_now, time))
    now, before = (f"has {size_now} bytes", f"had {size}") if size != size_now else times
    return UserError(
        f"corpus file {files.path(ending)} must stay as it is while a run reads it, but it {now}, and when the run listed it, it "
        f"{before}; start the same command again to go on with the text that is there now"
    )


def reading(index: ShardIndex, action: Callable[..., Result], *arguments) -> Result:
    """`action(shard, *arguments)`. If that fails, it is tried again with files opened anew: a handle may be stale."""

    def anew(_) -> Result:
        opened.cache_clear()
        return action(Shard(index), *arguments)

    try:
        return action(Shard(index), *arguments)
    except OSError:
        with files_at(index.prefix):
            return patiently(anew, Path(index.prefix), "start the same command again when the files of this shard are")


class Shard:
    """One shard while it is read. Holding it keeps its files open."""

    def __init__(self, index: ShardIndex):
        self.index, (self.idx, self.bin) = index, opened(index.files)
        if self.bin:  # at every use: a file may also be written anew in place, while it is open
            stamps = self.idx.stamp + self.bin.stamp
            if not index.files.stamps.startswith(stamps):
                raise changed(index.files, stamps)

    def window(self, low: int, high: int) -> tuple[numpy.ndarray | None, numpy.ndarray]:
        """(tokens [low, high), None if they are in object storage; first tokens of the documents there)"""
        starts = self.document_starts(low, high)
        return (self.tokens(low, high) if self.bin else None), starts

    def tokens(self, low: int, high: int) -> numpy.ndarray:
        dtype = self.index.dtype
        return numpy.frombuffer(self.bin.read(low * dtype.itemsize, (high - low) * dtype.itemsize), dtype)

    def document_start(self, document: int) -> int:
        """First token of a document; for the document after the last one, the number of tokens."""
        return int(self._places(document, document + 1)[0]) // self.index.dtype.itemsize

    def first_document(self, token: int) -> int:
        """The first document that starts at `token` or later."""
        place = token * self.index.dtype.itemsize
        first, places = self._block(place, self.index.documents, self._places)
        return first + int(places.searchsorted(place))

    def document_starts(self, low: int, high: int) -> numpy.ndarray:
        """First tokens of the documents that start in [low, high), which ends with the shard at the latest."""
        size = self.index.dtype.itemsize
        first, places = self._block(low * size, self.index.documents, self._places)
        blocks = [places[places.searchsorted(low * size) :]]
        while places[-1] < high * size:
            first += len(places)
            places = self._places(first, min(first + BLOCK, self.index.documents + 1))
            if places[0] < blocks[-1][-1]:
                raise out_of_order(self.index.prefix + ".idx")
            blocks.append(places)
        found = blocks[0] if len(blocks) == 1 else numpy.concatenate(blocks)
        return found[: found.searchsorted(high * size)] // size

    def targets(self, low: int, high: int) -> numpy.ndarray | None:
        """Which of the tokens [low, high) count; None where all do."""
        index, size = self.index, self.index.dtype.itemsize
        if not index.has_targets:
            return None
        found, places = self._block(low * size, index.sequences, lambda first, last: self._pointers(first, last - 1))
        at = int(places.searchsorted(low * size))
        first = found + at - int(places[at] > low * size)  # the sequence that holds the token `low`
        last = min(first + high - low, index.sequences)  # no sequence is empty
        borders = self._pointers(first, last) // size
        if first < 0 or borders[0] > low or borders[-1] < high or (borders[1:] < borders[:-1]).any():
            raise out_of_order(index.prefix + ".idx")
        modes = self.idx.read(HEADER.size + 12 * index.sequences + 8 * (index.documents + 1) + first, last - first)
        return numpy.repeat(numpy.frombuffer(modes, numpy.int8) != 0, numpy.diff(borders.clip(low, high)))

    def _block(self, place: int, last: int, read: Callable) -> tuple[int, numpy.ndarray]:
        """(first number, places) of a block with the first document, or sequence, that begins at `place` or later; `last` is the
        largest number, and `read` looks places up. They are nearly evenly spread, so two guesses are usual; every second one is
        the middle, so that no corpus needs many."""
        low, high, begin, end = 0, last + 1, 0, self.index.tokens * self.index.dtype.itemsize
        halve = False
        while low < high:
            share = 0.5 if halve else (place - begin) / max(end - begin, 1)
            first = max(low, min(low + int((high - low) * share) - BLOCK // 2, high - BLOCK))
            places = read(first, min(first + BLOCK, high))
            if places[-1] < place:
                low, begin = first + len(places), int(places[-1])
            elif places[0] >= place and first > low:
                high, end = first + 1, int(places[0])
            else:
                return first, places
            halve = not halve
        raise out_of_order(self.index.prefix + ".idx")

    def _places(self, first: int, last: int) -> numpy.ndarray:
        """Where the documents [first, last) begin in the .bin, in bytes and in order. A document is one sequence or more."""
        index, size = self.index, self.index.dtype.itemsize
        sequences = self._numbers(12 * index.sequences + 8 * first, last - first)
        low, high = (int(sequences[0]), int(sequences[-1])) if len(sequences) else (0, -1)
        try:
            if not 0 <= low <= high <= index.sequences:
                raise IndexError
            if high - low < 4 * BLOCK:
                places = self._pointers(low, high)[sequences - low]
            else:
                places = numpy.concatenate([self._pointers(s, s) for s in sequences.tolist()])
            if places[0] < 0 or places[-1] > index.tokens * size or (places[1:] < places[:-1]).any():
                raise IndexError
        except IndexError:
            raise out_of_order(index.prefix + ".idx") from None
        return places

    def _pointers(self, low: int, high: int) -> numpy.ndarray:
        """Where the sequences [low, high] begin in the .bin, in bytes; the one after the last begins at its end."""
        sequences = self.index.sequences
        pointers = self._numbers(4 * sequences + 8 * low, min(high + 1, sequences) - low)
        if high < sequences:
            return pointers
        return numpy.append(pointers, self.index.tokens * self.index.dtype.itemsize)

    def _numbers(self, start: int, count: int) -> numpy.ndarray:
        return numpy.frombuffer(self.idx.read(HEADER.size + start, 8 * count), "<i8")
