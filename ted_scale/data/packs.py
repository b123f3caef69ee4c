"""Packs: which whole examples share a row of seq_len tokens. They are computed once and kept in a file beside the shards.

The longest document is placed first. Each goes into the row that it fills best. stream.py reads a row by its number, which is a
pure function of the position, like the number of a window. One process of a node makes the packs, and the others wait. Note: the
file's name has a digest of the text and of the settings. So an old file is never used for another text, and nodes that make it at
the same time write the same bytes. The header has a digest of the rest of the file, which is checked once, when it is opened.
"""

import contextlib
import hashlib
import logging
import os
import struct
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale.base.durable import PART, write_file
from ted_scale.base.errors import UserError, files_at
from ted_scale.base.paths import own_folder
from ted_scale.base.patience import patiently
from ted_scale.config.data import Streaming
from ted_scale.corpora.corpus import Part
from ted_scale.corpora.local import File, open_file
from ted_scale.corpora.reader import Shard, reading
from ted_scale.corpora.remote import locked
from ted_scale.corpora.shards import ShardIndex
from ted_scale.storage.objects import is_remote

log = logging.getLogger("ted_scale")

MAGIC = b"TEDPACKS3"
HEADER = struct.Struct("<9s32sQQQQQQQ")
COUNTS = struct.Struct("<QQQQQQQ")
DIGESTED = HEADER.size - COUNTS.size  # the digest covers all bytes from here on
PIECE = numpy.dtype([("start", "<i8"), ("length", "<i4")])
LOOKED_AT = 1 << 22  # tokens whose documents are looked up at once
READ = 1 << 22  # bytes that are digested at once


class Counts(NamedTuple):
    """What happened to the documents of a part."""

    packs: int
    pieces: int
    tokens: int  # in packs
    longer: int  # documents longer than seq_len, which were cut or left out
    untaught: int  # pieces without a target, left out
    first: int  # token at which the first longer document begins
    first_untaught: int  # token at which the first piece without a target begins


class Packs(NamedTuple):
    path: str
    digest: bytes
    counts: Counts
    part: Part
    seq_len: int
    longer: str  # data.longer

    @property
    def tokens(self) -> int:
        """The number of tokens for which blend.py counts as many windows as there are packs."""
        return (self.counts.packs + 1) * self.seq_len

    @property
    def content(self) -> str:
        """An identity of text and packs: it differs if the text differs or if it is packed differently."""
        return f"{self.part.content}, packed by {self.seq_len}, longer: {self.longer}"

    def pieces(self, number: int) -> list[tuple[int, int]]:
        """(first token, tokens) of each document of a pack."""
        counts = self.counts
        low, high = numpy.frombuffer(self._read(HEADER.size + 8 * number, 16), "<i8").tolist()
        if not 0 <= low < high <= counts.pieces:
            raise damaged(self.path)
        place = HEADER.size + 8 * (counts.packs + 1) + PIECE.itemsize * low
        found = numpy.frombuffer(self._read(place, PIECE.itemsize * (high - low)), PIECE)
        starts, lengths = found["start"], found["length"].astype(numpy.int64)
        inside = starts.min() >= 0 and lengths.min() > 0 and (starts + lengths).max() <= self.part.tokens
        if not inside or lengths.sum() > self.seq_len:
            raise damaged(self.path)
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))

    def _read(self, start: int, count: int) -> bytes:
        """Read. If that fails, open the file again and retry, because a handle may be stale."""

        def anew(_) -> bytes:
            opened.cache_clear()
            return opened(self.path, self.digest).read(start, count)

        try:
            return opened(self.path, self.digest).read(start, count)
        except OSError:
            with files_at(self.path):
                return patiently(anew, Path(self.path), "start the same command again when this file is")

    def __str__(self) -> str:
        found = self.counts
        padding = 1 - found.tokens / (found.packs * self.seq_len)
        said = f"{found.pieces:,} examples in {found.packs:,} rows of {self.seq_len:,} tokens, {padding:.2%} padding"
        if found.longer:
            does = "are cut" if self.longer == "cut" else "are left out"
            said += f"; {found.longer:,} longer ones {does}, the first is {place_in(self.part, found.first)}"
        if found.untaught:
            first = place_in(self.part, found.first_untaught)
            said += f"; {found.untaught:,} pieces without a target are left out, the first begins in {first}"
        return said


def place_in(part: Part, token: int) -> str:
    """The document that holds this token, and how to look at it."""
    index, document = document_at(part, token)
    return f"document {document:,} of {index.prefix} (ted-scale inspect {index.prefix} --document {document})"


def document_at(part: Part, token: int) -> tuple[ShardIndex, int]:
    """(shard, number in the shard) of the document that begins at a token of a part, or that holds the part's first token."""
    shard = bisect_right(part.starts, part.start + token) - 1
    index, place = part.shards[shard], part.start + token - part.starts[shard]
    number = reading(index, Shard.first_document, place)
    return index, number - (reading(index, Shard.document_start, number) > place)


@lru_cache(maxsize=64)
def opened(path: str, digest: bytes) -> File:
    file, found = open_file(path), hashlib.sha256()
    for start in range(DIGESTED, file.size, READ):
        found.update(file.read(start, min(READ, file.size - start)))
    if found.digest() != digest:
        raise damaged(path)
    return file


def damaged(path) -> UserError:
    return UserError(f"{path} must hold the packs of a corpus, but is damaged; delete it to have it made again")


def open_packs(part: Part, seq_len: int, longer: str) -> Packs:
    """The packs of a part. If they do not exist, the first process of a node makes them. If it finds a mistake, the others find
    it, too. If it is killed, another process makes them."""
    path = place_of(part, seq_len, longer)
    with files_at(path):
        if not path.exists():
            with locked(own_place(part) / f"{path.name}.lock"):
                if not path.exists():
                    log.info(f"corpus {part.name}: packing its documents into rows of {seq_len:,} tokens")
                    write(path, *make(part, seq_len, longer))
        digest, counts = read_header(path)
        opened(str(path), digest)
        return Packs(str(path), digest, counts, part, seq_len, longer)


def place_of(part: Part, seq_len: int, longer: str) -> Path:
    """The file of the packs: beside the shards if this user may write there, else in the folder of cached objects."""
    unsigned = [index.files.stamps for index in part.shards if not index.recorded]
    text = repr((MAGIC, part.listed, part.start, part.stop, unsigned, seq_len, longer))
    prefix = part.shards[0].prefix
    name = f"{prefix.rpartition('/')[2]}.packs-{seq_len}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not is_remote(prefix):
        beside = Path(prefix).absolute().parent
        if (beside / name).exists() or os.access(beside, os.W_OK):
            return beside / name
    return own_place(part) / name


def own_place(part: Part) -> Path:
    """A folder for packs that belongs to this user on this node."""
    settings = part.stream or Streaming()
    if not settings.folder:
        own_folder(settings.place, "data.stream.folder")
    (settings.place / "packs").mkdir(parents=True, exist_ok=True)
    return settings.place / "packs"


def write(path: Path, counts: Counts, borders: numpy.ndarray, pieces: numpy.ndarray) -> None:
    """Write the file whole or not at all. Several nodes may do this at the same time: each writes its own file and then renames
    it."""
    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}{PART}")
    try:
        content = COUNTS.pack(*counts) + borders.tobytes() + pieces.tobytes()
        write_file(aside, [MAGIC, hashlib.sha256(content).digest(), content])
        aside.rename(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()


def read_header(path: Path) -> tuple[bytes, Counts]:
    """(digest of what follows it, counts)"""
    file = open_file(path)
    header = file.read(0, HEADER.size) if file.size >= HEADER.size else bytes(HEADER.size)
    magic, digest, *numbers = HEADER.unpack(header)
    counts = Counts(*numbers)
    size = HEADER.size + 8 * (counts.packs + 1) + PIECE.itemsize * counts.pieces
    if magic != MAGIC or file.size != size or not counts.packs:
        raise damaged(path)
    return digest, counts


def make(part: Part, seq_len: int, longer: str) -> tuple[Counts, numpy.ndarray, numpy.ndarray]:
    """(counts, borders, pieces): the documents of pack p are the pieces from borders[p] to borders[p + 1]."""
    starts = numpy.append(document_starts(part), part.tokens)
    pieces, too_long = cut(starts, seq_len, longer == "cut")
    taught = with_targets(part, pieces)
    untaught, first = int((~taught).sum()), first_of(starts[:-1], too_long)
    first_untaught, pieces = first_of(pieces["start"], ~taught), pieces[taught]
    if not len(pieces):
        raise nothing_to_learn(part, seq_len, untaught, first_untaught, int(too_long.sum()), first)
    packs = best_fit(pieces["length"], seq_len)
    order = numpy.lexsort((numpy.arange(len(pieces)), packs))
    borders = numpy.append(0, numpy.cumsum(numpy.bincount(packs))).astype("<i8")
    tokens = int(pieces["length"].sum())
    counts = Counts(len(borders) - 1, len(pieces), tokens, int(too_long.sum()), untaught, first, first_untaught)
    return counts, borders, pieces[order]


def first_of(places: numpy.ndarray, which: numpy.ndarray) -> int:
    """The first of these places; 0 if there is none."""
    return int(places[which.argmax()]) if which.any() else 0


def nothing_to_learn(
    part: Part, seq_len: int, untaught: int, first_untaught: int, longer: int, first: int
) -> UserError:
    """The error, with the place of the first document that caused it and how to look at it."""
    if untaught:
        found = f"{untaught:,} pieces without one, the first in {place_in(part, first_untaught)}"
    else:
        found = f"{longer:,} longer documents, the first is {place_in(part, first)}"
    return UserError(
        f"{part.name} must hold an example with a target within data.seq_len ({seq_len}), but holds none: {found}; make "
        "data.seq_len larger"
    )


def document_starts(part: Part) -> numpy.ndarray:
    """Where the documents of a part begin, and the part itself."""
    found = [numpy.zeros(1, numpy.int64)]
    for first in range(0, part.tokens, LOOKED_AT):
        found.append(first + part.begins(first, min(LOOKED_AT, part.tokens - first)))
    return numpy.unique(numpy.concatenate(found))


def cut(starts: numpy.ndarray, seq_len: int, cuts: bool) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(pieces, which documents are longer than seq_len). Longer documents are cut into as few pieces as possible, or left out."""
    lengths = numpy.diff(starts)
    longer = lengths > seq_len
    counts = -(-lengths // seq_len) if cuts else (~longer).astype(numpy.int64)
    which = numpy.repeat(numpy.arange(len(lengths)), counts)
    number = numpy.arange(len(which)) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
    pieces = numpy.zeros(len(which), PIECE)
    pieces["start"] = starts[which] + number * seq_len
    pieces["length"] = numpy.minimum(lengths[which] - number * seq_len, seq_len)
    return pieces, longer


def with_targets(part: Part, pieces: numpy.ndarray) -> numpy.ndarray:
    """Which pieces have a target. The first token of a piece is never a label in it, so it does not count."""
    taught, first = pieces["length"] > 1, 0
    while first < len(pieces):
        low = int(pieces["start"][first])
        last = max(first + 1, int(pieces["start"].searchsorted(low + LOOKED_AT)))
        some = pieces[first:last]
        ends = some["start"] + some["length"] - low
        if (targets := part.targets(low, int(ends[-1]))) is not None:
            before = numpy.append(0, numpy.cumsum(targets))
            taught[first:last] &= before[ends] > before[some["start"] + 1 - low]
        first = last
    return taught


def best_fit(lengths: numpy.ndarray, seq_len: int) -> numpy.ndarray:
    """The pack of each document. The longest document is placed first, each in the fullest pack that has room. For each amount of
    room, a bit says whether a pack has it, so the fullest pack is found in a few operations."""
    packs, rooms, has = numpy.empty(len(lengths), numpy.int64), [[] for _ in range(seq_len + 1)], 0
    made = 0
    for document in numpy.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        if fits := has >> length:
            room = length + (fits & -fits).bit_length() - 1
            pack = rooms[room].pop()
            has ^= 0 if rooms[room] else 1 << room
        else:
            room, pack, made = seq_len, made, made + 1
        packs[document] = pack
        rooms[room - length].append(pack)
        has |= 1 << (room - length)
    return packs
