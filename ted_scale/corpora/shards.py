"""What a corpus is on disk: Megatron .bin/.idx pairs, and the sidecar .json that tools/tokenize_corpus.py adds.

Everything is checked from headers and file sizes, in constant time per shard and without torch or megatron, so that a
dry run can do it. remote.py finds the same files in object storage, corpus.py reads tokens. Note: the .idx counts one
document more than there are, because it stores borders.
"""

import hashlib
import os
import re
import stat
import struct
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale.base.errors import UserError, files_at
from ted_scale.base.parsing import fits, parse_json
from ted_scale.storage.objects import Object

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
TOKEN_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # by code
OUTPUT_MANIFEST = ".manifest.json"  # ends the name of what describes all shards of an output
SIDECAR = {"max_token_id": int, "tokens": int}
SIGNED = {"bin_bytes": int, "bin_sha256": str, "idx_sha256": str, "documents": int, "read": dict} | {
    "tokenizer": str, "tokenizer_digest": str, "vocab_size": int, "eod_id": int
}  # fmt: skip
LARGEST_SIDECAR = 1 << 20  # bytes; a thousandth is usual
TOKENIZE = "write it with tools/tokenize_corpus.py"
SHARD_NUMBER = re.compile(r"-\d{5}$")
SMALL_INDEX = (
    1 << 16
)  # bytes hashed at every open, 0.1 ms: ten thousand shards open in seconds; inspect_corpus hashes all


class Files(NamedTuple):
    """The files of the shard called `prefix`: its .bin may be in object storage, the others are on local disk."""

    prefix: str
    idx: Path
    sidecar: Path | None
    bin_bytes: int
    remote_bin: Object | None = None
    stamp: tuple = ()  # differs for files that replaced others of the same names; fetched copies have a version in their names


class ShardIndex(NamedTuple):
    """One shard as its header describes it; `sidecar` is None for a shard written by another tool."""

    prefix: str
    dtype: numpy.dtype
    sequences: int
    documents: int
    tokens: int
    sidecar: dict | None
    files: Files


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


def unfinished(prefix: str | os.PathLike) -> Path:
    """The folder of an output's shards until all are there. Nothing in it has a name that a corpus path could mean."""
    return Path(prefix).with_name(f".{Path(prefix).name}.unfinished")


def _exists(prefix: str) -> bool:
    return any(_status(Path(prefix + ending)) for ending in (".idx", ".bin"))


def _prefixes(folder: Path) -> list[str]:
    # A .bin without .idx counts: a set of shards that lost an index must be refused, not read in part.
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    stems = {name[:-4] for name in names if name.endswith((".bin", ".idx"))}
    return [str(folder / stem) for stem in sorted(stems)]


def read_index(prefix: str | os.PathLike) -> ShardIndex:
    """Read and check the header of one shard; a UserError names the file that is wrong."""
    prefix = str(prefix)
    paths = [Path(prefix + ending) for ending in (".idx", ".bin", ".json")]
    idx, bin_file, sidecar = (_status(path) for path in paths)
    if idx is None and unfinished(prefix).exists():
        raise UserError(f"corpus {prefix} must be finished, but is not; run the command that began it again")
    if idx is None or bin_file is None:
        raise missing(str(paths[0 if idx is None else 1]))
    stamp = tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in (idx, bin_file, sidecar) if s)
    return check(Files(prefix, paths[0], paths[2] if sidecar else None, bin_file.st_size, None, stamp))


def _status(path: Path) -> os.stat_result | None:
    with files_at(path):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
            return None
    return status if stat.S_ISREG(status.st_mode) else None


def missing(path: str) -> UserError:
    return UserError(f"corpus file {path} must exist, but is missing; give a prefix, or {TOKENIZE}")


@lru_cache(maxsize=1 << 16)
def check(files: Files) -> ShardIndex:
    """A shard as its header, sizes and sidecar describe it; they must agree. Cached, because plan, stages and every
    validation call it again."""
    idx = files.prefix + ".idx"
    with files_at(idx), files.idx.open("rb") as file:
        dtype, sequences, borders = _header(idx, file.read(HEADER.size))
        if os.fstat(file.fileno()).st_size < HEADER.size + 12 * sequences + 8 * borders:
            raise UserError(
                f"corpus file {idx} must have the size that its counts ask for, but is truncated; {TOKENIZE}"
            )
        tokens = _tokens(idx, file, dtype, sequences)
        _check_bin(files, tokens, dtype)
        if borders < 2 or _entry(file, HEADER.size + 12 * sequences + 8 * (borders - 1), "<q") != sequences:
            raise UserError(
                f"corpus file {idx} must end its last document at its last sequence, but does not; {TOKENIZE}"
            )
    return ShardIndex(files.prefix, dtype, sequences, borders - 1, tokens, _sidecar(files, tokens), files)


def _header(idx: str, head: bytes) -> tuple[numpy.dtype, int, int]:
    if head[: len(MAGIC)] != MAGIC:
        raise UserError(f"corpus file {idx} must be a Megatron index, but starts with {head[:9]!r}; {TOKENIZE}")
    if len(head) < HEADER.size:
        raise UserError(f"corpus file {idx} must hold a {HEADER.size}-byte header, but is truncated; {TOKENIZE}")
    _, version, code, sequences, borders = HEADER.unpack(head)
    if version != 1:
        raise UserError(
            f"corpus file {idx} must be a Megatron index of version 1, but is version {version}; {TOKENIZE}"
        )
    if code not in TOKEN_TYPES:
        raise UserError(f"corpus file {idx} must hold integer tokens, but has dtype code {code}; {TOKENIZE}")
    return numpy.dtype(TOKEN_TYPES[code]), sequences, borders


def _tokens(idx: str, file, dtype: numpy.dtype, sequences: int) -> int:
    """Tokens up to the end of the last sequence: its pointer and its length, the only two entries read."""
    if sequences == 0:
        return 0
    length = _entry(file, HEADER.size + 4 * (sequences - 1), "<i")
    pointer = _entry(file, HEADER.size + 4 * sequences + 8 * (sequences - 1), "<q")
    if length < 0 or pointer < 0 or pointer % dtype.itemsize:
        raise out_of_order(idx)
    return pointer // dtype.itemsize + length


def _entry(file, offset: int, form: str) -> int:
    file.seek(offset)
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _check_bin(files: Files, tokens: int, dtype: numpy.dtype) -> None:
    path, want = files.prefix + ".bin", tokens * dtype.itemsize
    if tokens == 0:
        raise UserError(f"corpus file {path} must hold tokens, but is empty (0 tokens); {TOKENIZE}")
    if files.bin_bytes < want:
        raise UserError(
            f"corpus file {path} must hold {want} bytes as its .idx says, but is {files.bin_bytes} long; copy it again"
        )


def _sidecar(files: Files, tokens: int) -> dict | None:
    if files.sidecar is None:
        return None
    path = files.prefix + ".json"
    sidecar = read_sidecar(files.sidecar, path)
    if sidecar["tokens"] != tokens:
        raise UserError(
            f"corpus file {path} must belong to its shard, but counts {sidecar['tokens']} tokens where the .idx has "
            f"{tokens}; delete it or tokenize again"
        )
    check_recorded(files, sidecar, SMALL_INDEX)
    return sidecar


def read_sidecar(path: Path, called: str) -> dict:
    """What a sidecar holds. Sentences use `called` for the copy of a remote one."""
    with files_at(called):
        content = path.read_bytes() if path.stat().st_size <= LARGEST_SIDECAR else b""
    try:
        sidecar = parse_json(content)
    except ValueError:
        sidecar = None
    if not fits(sidecar, SIDECAR, SIGNED):
        raise UserError(f"corpus file {called} must describe its shard, but is unreadable; delete it or tokenize again")
    return sidecar


def check_recorded(files: Files, sidecar: dict, largest_index: float = float("inf")) -> None:
    """The files must be those of the sidecar: by the .bin's size, and the digest of an .idx that is not too large."""
    size, prefix = files.bin_bytes, files.prefix
    if sidecar.get("bin_bytes", size) != size:
        raise UserError(
            f"corpus file {prefix}.bin must hold the {sidecar['bin_bytes']} bytes that {prefix}.json records, but holds "
            f"{size}; copy it again"
        )
    if "idx_sha256" in sidecar and files.idx.stat().st_size <= largest_index:
        with files.idx.open("rb") as file:
            check_digest(prefix + ".idx", hashlib.file_digest(file, "sha256").hexdigest(), sidecar["idx_sha256"])


def check_digest(path: str, found: str, recorded: str) -> None:
    if found != recorded:
        raise UserError(
            f"corpus file {path} must have the digest that its .json records ({recorded[:12]}…), but has {found[:12]}…; "
            "copy it again"
        )


def document_borders(index: ShardIndex) -> numpy.ndarray:
    """Where documents begin, in tokens, and at the end where the last one ends."""
    lengths = numpy.fromfile(index.files.idx, "<i4", index.sequences, offset=HEADER.size)
    borders = numpy.fromfile(index.files.idx, "<i8", index.documents + 1, offset=HEADER.size + 12 * index.sequences)
    ends = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
    sound = lengths.min() >= 0 and ends[-1] == index.tokens and borders[0] == 0 and (numpy.diff(borders) >= 0).all()
    if not sound:
        raise out_of_order(index.prefix + ".idx")
    return ends[borders]


def out_of_order(idx: str) -> UserError:
    return UserError(f"corpus file {idx} must hold lengths that add up and borders in order, but does not; {TOKENIZE}")


def tokenizer_of(what: str, indices: list[ShardIndex]) -> tuple[str, str] | None:
    """(shard, digest) of the tokenizer of all shards that record one. It must be the same; `what` begins the sentence."""
    signed = [(i.prefix, i.sidecar["tokenizer_digest"]) for i in indices if "tokenizer_digest" in (i.sidecar or {})]
    for prefix, digest in signed:
        if digest != signed[0][1]:
            raise UserError(
                f"{what} must be written with one tokenizer, but {prefix} is written with another than {signed[0][0]}; "
                "tokenize one of them again"
            )
    return signed[0] if signed else None


def check_vocabulary(index: ShardIndex, vocab_size: int) -> None:
    """Refuse a shard whose sidecar records an id outside the vocabulary. Without a sidecar the loader finds it later."""
    largest = index.sidecar["max_token_id"] if index.sidecar else -1
    if largest >= vocab_size:
        raise out_of_vocabulary(index.prefix, largest, vocab_size)


def out_of_vocabulary(prefix: str, token: int, vocab_size: int) -> UserError:
    """The sentence for a token that the model has no row for, wherever it is found."""
    return UserError(
        f"corpus shard {prefix} must hold token ids in 0..{vocab_size - 1} (vocabulary size {vocab_size}), "
        f"but holds {token}; tokenize it with the model's own tokenizer"
    )
