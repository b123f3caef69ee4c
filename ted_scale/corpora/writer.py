"""Write shards: encoded documents as .bin and .idx in megatron's format, and a sidecar that describes them.

Files end in .part until output.py publishes them; shards.py checks what is read. Note: the sidecar is written last, and
durably. So a shard with a sidecar is finished, and the sidecar records the position in the inputs at which a restart begins.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy

from ted_scale.base.beneath import make_new
from ted_scale.base.durable import sync, write_durably, write_file
from ted_scale.base.errors import UserError
from ted_scale.base.parsing import fits
from ted_scale.corpora.shards import HEADER, MAGIC, TOKEN_TYPES, read_sidecar


class Encoded(NamedTuple):
    """Documents one after another, each with its end-of-document token."""

    ids: numpy.ndarray
    lengths: numpy.ndarray
    targets: numpy.ndarray | None = None  # where only some tokens count: 1 for each that does
    refused: tuple[
        tuple[int, str], ...
    ] = ()  # (number in the batch, the rest of a sentence) of what cannot be learned from


class Runs(NamedTuple):
    """Targets as Megatron's index can hold them: sequences within documents, each of one mode."""

    lengths: numpy.ndarray
    modes: numpy.ndarray  # 1: its tokens count
    counts: numpy.ndarray  # of each document


class Mark(NamedTuple):
    """What of the inputs was read up to a document: file and line, and how many documents were empty or unreadable."""

    file: int = 0
    line: int = 0
    empty: int = 0
    skipped: int = 0


MARK = dict.fromkeys(Mark._fields, int)


def dtype_of(vocab_size: int) -> numpy.dtype:
    return numpy.dtype("uint16" if vocab_size < 65500 else "int32")  # megatron's own rule


def part(folder: Path, number: int, ending: str) -> Path:
    return folder / f"{number:05d}{ending}.part"


def finished_shards(folder: Path) -> list[dict]:
    """The sidecars of the shards that a run finished in `folder`, in order."""
    found = []
    while (path := part(folder, len(found) + 1, ".json")).exists():
        found.append(sidecar := read_sidecar(path, str(path)))
        if not fits(sidecar, {"documents": int, "bin_bytes": int}) or not fits(sidecar.get("read"), MARK):
            raise UserError(
                f"{path} must say where its shard ends in the inputs, but does not; delete it to write it again"
            )
    return found


class Writer:
    """Writes shards after the `finished` ones. A document that would make one larger than `shard_tokens` begins the next."""

    def __init__(self, folder: Path, about: dict, shard_tokens: int, finished: list[dict]):
        self.folder, self.about, self.shard_tokens = folder, about, shard_tokens
        self.dtype = dtype_of(about["vocab_size"])
        self.sidecars = list(finished)
        self._new_shard()

    def _new_shard(self) -> None:
        self.file: BinaryIO | None = None
        self.sha256, self.mark = hashlib.sha256(), Mark()
        self.lengths: list[numpy.ndarray] = []
        self.runs: list[Runs] = []
        self.tokens = self.largest = 0

    def add(self, encoded: Encoded, marks: list[Mark]) -> None:
        ends = numpy.cumsum(encoded.lengths, dtype=numpy.int64)
        first = begin = 0
        while first < len(ends):
            stop = int(numpy.searchsorted(ends, begin + self.shard_tokens - self.tokens, side="right"))
            if not self.tokens:
                stop = max(stop, first + 1)  # a document above the bound gets a shard of its own
            if stop > first:
                some = slice(begin, int(ends[stop - 1]))
                self._append(encoded.ids[some], encoded.lengths[first:stop], marks[stop - 1])
                if encoded.targets is not None:
                    self.runs.append(runs_of(encoded.targets[some], encoded.lengths[first:stop]))
                first, begin = stop, int(ends[stop - 1])
            if stop < len(ends):
                self.finish_shard()

    def _append(self, ids: numpy.ndarray, lengths: numpy.ndarray, mark: Mark) -> None:
        self.file = self.file or os.fdopen(make_new(part(self.folder, len(self.sidecars) + 1, ".bin")), "wb")
        self.file.write(ids.data)
        self.sha256.update(ids.data)
        self.lengths.append(lengths)
        self.tokens, self.largest, self.mark = self.tokens + len(ids), max(self.largest, int(ids.max())), mark

    def finish_shard(self) -> None:
        if not self.tokens:
            return
        number, lengths = len(self.sidecars) + 1, numpy.concatenate(self.lengths).astype(numpy.int32)
        runs = Runs(*map(numpy.concatenate, zip(*self.runs, strict=True))) if self.runs else None
        index = index_bytes(lengths, self.dtype, runs)
        self.file.close()
        write_file(part(self.folder, number, ".idx"), [index])
        sync(part(self.folder, number, ".bin"))
        sidecar = {
            **self.about,
            "documents": len(lengths),
            "tokens": self.tokens,
            **({"targets": int(runs.lengths[runs.modes > 0].sum())} if runs else {}),
            "max_token_id": self.largest,
            "bin_bytes": self.tokens * self.dtype.itemsize,
            "bin_sha256": self.sha256.hexdigest(),
            "idx_sha256": hashlib.sha256(index).hexdigest(),
            "read": self.mark._asdict(),
        }
        write_durably(part(self.folder, number, ".json"), as_text(sidecar))
        self.sidecars.append(sidecar)
        self._new_shard()


def runs_of(targets: numpy.ndarray, lengths: numpy.ndarray) -> Runs:
    """The stretches of equal targets in each document."""
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    begins = numpy.append(True, targets[1:] != targets[:-1])
    begins[ends[:-1]] = True
    at = numpy.flatnonzero(begins)
    counts = numpy.diff(at.searchsorted(ends), prepend=0)
    return Runs(numpy.diff(at, append=len(targets)), targets[at].astype(numpy.int8), counts)


def index_bytes(lengths: numpy.ndarray, dtype: numpy.dtype, runs: Runs | None = None) -> bytes:
    """The .idx: lengths of sequences, where they begin in the .bin, document borders. A document is one sequence; with targets it
    is its runs, and their modes come last, where Megatron has those of its multimodal sequences."""
    code = next(code for code, name in TOKEN_TYPES.items() if name == dtype.name)
    counts = runs.counts if runs else numpy.ones(len(lengths), numpy.int64)
    sequences = (runs.lengths if runs else lengths).astype(numpy.int32)
    borders = numpy.append(0, numpy.cumsum(counts)).astype(numpy.int64)
    header = HEADER.pack(MAGIC, 1, code, len(sequences), len(borders))
    pointers = (numpy.cumsum(sequences, dtype=numpy.int64) - sequences) * dtype.itemsize
    modes = runs.modes.tobytes() if runs else b""
    return b"".join((header, sequences.data, pointers.data, borders.data, modes))


def as_text(content: dict) -> str:
    return json.dumps(content, indent=1) + "\n"
