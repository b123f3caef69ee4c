"""Shards out, all or nothing: written by megatron-core under hidden temporary names, renamed together at the end.

What is in them is the tokenizer tool's business, what a reader accepts shards.py's. The surprise: .idx files are
renamed last, so a run killed at any moment leaves nothing that loads.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale.corpora import megatron_indexed
from ted_scale.tokenizer import Tokenizer, digest


class Encoded(NamedTuple):
    """Documents one after another, each with its end-of-document token."""

    ids: numpy.ndarray
    lengths: list[int]


class Writer:
    """Shards under temporary names until `publish`; one shard, or a numbered one whenever `shard_tokens` are full."""

    def __init__(self, out: Path, shard_tokens: int | None, tokenizer_path: str, tokenizer: Tokenizer):
        self.out, self.shard_tokens = out, shard_tokens
        self.about = {
            "tokenizer": str(tokenizer_path),
            "tokenizer_digest": digest(tokenizer),
            "vocab_size": len(tokenizer.pieces),
            "eod_id": tokenizer.eod,
        }
        self.megatron = megatron_indexed()
        self.dtype = self.megatron.DType.optimal_dtype(len(tokenizer.pieces))
        self.names: list[str] = []
        self.builder = None
        self.tokens = self.documents = self.largest = 0

    def add(self, encoded: Encoded) -> None:
        start = 0
        for length in encoded.lengths:
            full = self.shard_tokens and self.tokens and self.tokens + length > self.shard_tokens
            if self.builder is None or full:
                self._next_shard()
            ids = encoded.ids[start : start + length]
            self.builder.add_document(ids, [length])
            start, self.tokens, self.documents = start + length, self.tokens + length, self.documents + 1
            self.largest = max(self.largest, int(ids.max()))

    def _next_shard(self) -> None:
        self.finish_shard()
        name = f"{self.out.name}-{len(self.names) + 1:05d}" if self.shard_tokens else self.out.name
        self.names.append(name)
        self.builder = self.megatron.IndexedDatasetBuilder(str(self._temporary(name, ".bin")), dtype=self.dtype)
        self.tokens = self.documents = self.largest = 0

    def finish_shard(self) -> None:
        if self.builder is None:
            return
        name = self.names[-1]
        self.builder.finalize(str(self._temporary(name, ".idx")))
        counts = {"documents": self.documents, "tokens": self.tokens, "max_token_id": self.largest}
        self._temporary(name, ".json").write_text(json.dumps({**self.about, **counts}, indent=1) + "\n")
        for ending in (".bin", ".idx", ".json"):
            _sync(self._temporary(name, ending))
        self.builder = None

    def publish(self) -> None:
        """Rename everything to its name: an older output goes first, an index comes last."""
        self.finish_shard()
        for old in sorted(existing(self.out), key=lambda path: path.suffix != ".idx"):
            old.unlink()
        for ending in (".bin", ".json", ".idx"):
            for name in self.names:
                self._temporary(name, ending).rename(self.out.with_name(name + ending))
        _sync(self.out.parent)

    def _temporary(self, name: str, ending: str) -> Path:
        return self.out.with_name(f".{name}{ending}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def existing(out: Path, hidden: bool = False) -> list[Path]:
    """Files of an output of this name, or (hidden) the temporaries of a run that died."""
    start, end = (r"\.", r"\.tmp") if hidden else ("", "")
    ours = re.compile(rf"{start}{re.escape(out.name)}(-\d{{5}})?\.(bin|idx|json){end}")
    return [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]


def clear_temporaries(out: Path) -> None:
    for path in existing(out, hidden=True):
        path.unlink()
