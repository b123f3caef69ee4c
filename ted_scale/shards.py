"""What a corpus is on disk: Megatron .bin/.idx pairs, and the sidecar .json that tools/tokenize_corpus.py adds.

Everything is checked from headers and file sizes, in constant time per shard and without torch or megatron, so that a
dry run can do it. Reading tokens is data.py's business. The surprise: the .idx counts one document more than there are,
because it stores borders.
"""

import json
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
TOKENIZE = "write it with tools/tokenize_corpus.py"
SHARD_NUMBER = re.compile(r"-\d{5}$")


class ShardIndex(NamedTuple):
    """One shard as its header describes it; `sidecar` is None for a shard written by another tool."""

    prefix: str
    dtype: numpy.dtype
    sequences: int
    documents: int
    tokens: int
    sidecar: dict | None


def expand(path: str | os.PathLike) -> list[str]:
    """The shards that `path` means: a prefix, one with .bin/.idx, a numbered family NAME-00001…, or a folder."""
    prefix = re.sub(r"\.(bin|idx)$", "", str(path))
    if _exists(prefix):
        return [prefix]
    if Path(prefix).is_dir():
        found = _prefixes(Path(prefix))
        if not found:
            raise UserError(f"corpus folder {prefix} must hold .bin/.idx pairs, but holds none; {TOKENIZE}")
        return found
    name = Path(prefix).name
    family = [p for p in _prefixes(Path(prefix).parent) if SHARD_NUMBER.sub("", Path(p).name) == name]
    return family or [prefix]


def _exists(prefix: str) -> bool:
    return Path(prefix + ".idx").exists() or Path(prefix + ".bin").exists()


def _prefixes(folder: Path) -> list[str]:
    # A .bin without .idx counts: a set of shards that lost an index must be refused, not read in part.
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted({str(folder / name[:-4]) for name in names if name.endswith((".bin", ".idx"))})


def read_index(prefix: str | os.PathLike) -> ShardIndex:
    """Read and check the header of one shard; a UserError names the file that is wrong."""
    prefix = str(prefix)
    for ending in (".idx", ".bin"):
        if not Path(prefix + ending).is_file():
            raise UserError(f"corpus file {prefix}{ending} must exist, but is missing; give a prefix, or {TOKENIZE}")
    idx, size = prefix + ".idx", Path(prefix + ".idx").stat().st_size
    dtype, sequences, borders = _header(idx)
    if size < HEADER.size + 12 * sequences + 8 * borders:
        raise UserError(f"corpus file {idx} must have the size that its counts ask for, but is truncated; {TOKENIZE}")
    tokens = _tokens(idx, dtype, sequences)
    _check_bin(prefix + ".bin", tokens, dtype)
    if borders < 2 or _last_border(idx, sequences, borders) != sequences:
        raise UserError(f"corpus file {idx} must end its last document at its last sequence, but does not; {TOKENIZE}")
    return ShardIndex(prefix, dtype, sequences, borders - 1, tokens, _sidecar(prefix, tokens))


def _header(idx: str) -> tuple[numpy.dtype, int, int]:
    with Path(idx).open("rb") as file:
        head = file.read(HEADER.size)
    if head[: len(MAGIC)] != MAGIC:
        raise UserError(f"corpus file {idx} must be a Megatron index, but starts with {head[:9]!r}; {TOKENIZE}")
    if len(head) < HEADER.size:
        raise UserError(f"corpus file {idx} must hold a {HEADER.size}-byte header, but is truncated; {TOKENIZE}")
    _, version, code, sequences, borders = HEADER.unpack(head)
    if version != 1:
        raise UserError(
            f"corpus file {idx} must be a Megatron index of version 1, but is version {version}; {TOKENIZE}"
        )
    if code not in DTYPES:
        raise UserError(f"corpus file {idx} must hold integer tokens, but has dtype code {code}; {TOKENIZE}")
    return numpy.dtype(DTYPES[code]), sequences, borders


def _tokens(idx: str, dtype: numpy.dtype, sequences: int) -> int:
    """Tokens up to the end of the last sequence: its pointer and its length, the only two entries read."""
    if sequences == 0:
        return 0
    length = _entry(idx, HEADER.size + 4 * (sequences - 1), "<i")
    pointer = _entry(idx, HEADER.size + 4 * sequences + 8 * (sequences - 1), "<q")
    return pointer // dtype.itemsize + length


def _last_border(idx: str, sequences: int, borders: int) -> int:
    return _entry(idx, HEADER.size + 12 * sequences + 8 * (borders - 1), "<q")


def _entry(idx: str, offset: int, form: str) -> int:
    with Path(idx).open("rb") as file:
        file.seek(offset)
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _check_bin(path: str, tokens: int, dtype: numpy.dtype) -> None:
    if tokens == 0:
        raise UserError(f"corpus file {path} must hold tokens, but is empty (0 tokens); {TOKENIZE}")
    want, have = tokens * dtype.itemsize, Path(path).stat().st_size
    if have < want:
        raise UserError(
            f"corpus file {path} must hold {want} bytes as its .idx says, but is {have} long; copy it again"
        )


def _sidecar(prefix: str, tokens: int) -> dict | None:
    path = Path(prefix + ".json")
    if not path.exists():
        return None
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        ok = isinstance(sidecar["max_token_id"], int) and isinstance(sidecar["tokens"], int)
    except (ValueError, KeyError, TypeError):
        ok = False
    if not ok:
        raise UserError(f"corpus file {path} must describe its shard, but is unreadable; delete it or tokenize again")
    if sidecar["tokens"] != tokens:
        raise UserError(
            f"corpus file {path} must belong to its shard, but counts {sidecar['tokens']} tokens where the .idx has "
            f"{tokens}; delete it or tokenize again"
        )
    return sidecar


def check_vocabulary(index: ShardIndex, vocab_size: int) -> None:
    """Refuse a shard whose sidecar names an id outside the vocabulary; without sidecar the loader finds it later."""
    largest = index.sidecar["max_token_id"] if index.sidecar else -1
    if largest >= vocab_size:
        raise out_of_vocabulary(index.prefix, largest, vocab_size)


def out_of_vocabulary(prefix: str, token: int, vocab_size: int) -> UserError:
    """The one sentence for a token the model has no row for, whoever meets it."""
    return UserError(
        f"corpus shard {prefix} must hold token ids in 0..{vocab_size - 1} (vocabulary size {vocab_size}), "
        f"but holds {token}; tokenize it with the model's own tokenizer"
    )
