"""What a corpus is on disk: Megatron .bin/.idx pairs, and the sidecar .json that ted-scale tokenize adds.

Everything is checked from headers and file sizes, in constant time per shard and without torch or megatron, so that a
dry run can do it. local.py and remote.py find the files, corpus.py reads tokens. Note: the .idx counts one
document more than there are, because it stores borders.
"""

import hashlib
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy

from ted_scale.base.errors import UserError, files_at
from ted_scale.base.parsing import fits, parse_json
from ted_scale.corpora.local import TOKENIZE, File, Files, files_of, open_file, real_folder

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
TOKEN_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # by code
OUTPUT_MANIFEST = ".manifest.json"  # ends the name of what describes all shards of an output
SIDECAR = {"max_token_id": int, "tokens": int}
SIGNED = {"bin_bytes": int, "bin_sha256": str, "idx_sha256": str, "documents": int, "read": dict} | {
    "tokenizer": str, "tokenizer_digest": str, "vocab_size": int, "eod_id": int, "targets": int
}  # fmt: skip
LARGEST_SIDECAR = 1 << 20  # bytes; a thousandth is usual
# Bytes of an index that is hashed at every opening, in 0.1 ms: ten thousand shards open in seconds; inspect_corpus hashes all.
SMALL_INDEX = 1 << 16
PARALLEL, BATCH = 32, 32  # threads, and shards that one of them looks at in turn


class Recorded(NamedTuple):
    """What of a sidecar a run uses; None where it does not say."""

    max_token_id: int
    tokenizer_digest: str | None
    idx_sha256: str | None
    bin_sha256: str | None


class ShardIndex(NamedTuple):
    """One shard as its header describes it; nothing is recorded of a shard that was written by another tool."""

    files: Files
    dtype: numpy.dtype
    sequences: int
    documents: int
    tokens: int
    recorded: Recorded | None
    has_targets: bool = False  # its sequences have modes: only tokens of a mode that is not 0 count

    @property
    def prefix(self) -> str:
        return self.files.prefix


def read_index(prefix: str | os.PathLike) -> ShardIndex:
    """The checked header of one shard; a UserError names the file that is wrong."""
    return check(files_of(str(prefix), real_folder(str(prefix))))


def read_indices(prefixes: list[str]) -> list[ShardIndex]:
    """The checked headers of shards in one folder. Threads look at many at a time, because a file server takes a while for each."""
    folder = real_folder(prefixes[0])

    def look_at(some: list[str]) -> list[ShardIndex]:
        return [check(files_of(prefix, folder)) for prefix in some]

    batches = [prefixes[first : first + BATCH] for first in range(0, len(prefixes), BATCH)]
    with ThreadPoolExecutor(min(PARALLEL, len(batches))) as pool:
        return [index for found in pool.map(look_at, batches) for index in found]


@cache  # without a bound, because shards are asked for in order: of a corpus with more of them, nothing would be found
def check(files: Files) -> ShardIndex:
    """A shard as its header, sizes and sidecar describe it; they must agree. Cached, because the plan and every stage ask again."""
    idx = files.prefix + ".idx"
    with files_at(idx):
        file = open_file(files.path(".idx"))
        size = file.size
        head = file.read(0, size if size <= SMALL_INDEX else HEADER.size)
        dtype, sequences, borders = _header(idx, head[: HEADER.size])
        if size < HEADER.size + 12 * sequences + 8 * borders:
            raise UserError(
                f"corpus file {idx} must have the size that its counts ask for, but is truncated; {TOKENIZE}"
            )
        tokens = _tokens(idx, file, dtype, sequences)
        _check_bin(files, tokens, dtype)
        if borders < 2 or _entry(file, HEADER.size + 12 * sequences + 8 * (borders - 1), "<q") != sequences:
            raise UserError(
                f"corpus file {idx} must end its last document at its last sequence, but does not; {TOKENIZE}"
            )
    small = hashlib.sha256(head).hexdigest() if len(head) == size else None
    plain = HEADER.size + 12 * sequences + 8 * borders
    has_targets = size == plain + sequences
    if size not in (plain, plain + sequences):
        raise UserError(
            f"corpus file {idx} must have {plain:,} bytes, or {plain + sequences:,} with one for each of its {sequences} sequences "
            f"that says whether its tokens count, but has {size:,}; copy it again"
        )
    recorded = _recorded(files, tokens, small, has_targets)
    return ShardIndex(files, dtype, sequences, borders - 1, tokens, recorded, has_targets)


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


def _tokens(idx: str, file: File, dtype: numpy.dtype, sequences: int) -> int:
    """Tokens up to the end of the last sequence: its pointer and its length, the only two entries read."""
    if sequences == 0:
        return 0
    length = _entry(file, HEADER.size + 4 * (sequences - 1), "<i")
    pointer = _entry(file, HEADER.size + 4 * sequences + 8 * (sequences - 1), "<q")
    if length < 0 or pointer < 0 or pointer % dtype.itemsize:
        raise out_of_order(idx)
    return pointer // dtype.itemsize + length


def _entry(file: File, offset: int, form: str) -> int:
    return struct.unpack(form, file.read(offset, struct.calcsize(form)))[0]


def _check_bin(files: Files, tokens: int, dtype: numpy.dtype) -> None:
    path, want = files.prefix + ".bin", tokens * dtype.itemsize
    if tokens == 0:
        raise UserError(f"corpus file {path} must hold tokens, but is empty (0 tokens); {TOKENIZE}")
    if files.bin_bytes < want:
        raise UserError(
            f"corpus file {path} must hold {want} bytes as its .idx says, but is {files.bin_bytes} long; copy it again"
        )


def _recorded(files: Files, tokens: int, idx_sha256: str | None, has_targets: bool) -> Recorded | None:
    """What the sidecar records, which must be true; there is no digest of an index that is too large for every opening."""
    sidecar = sidecar_of(files)
    if sidecar is None:
        return None
    if sidecar["tokens"] != tokens:
        raise UserError(
            f"corpus file {files.prefix}.json must belong to its shard, but counts {sidecar['tokens']} tokens where the .idx has "
            f"{tokens}; delete it or tokenize again"
        )
    check_recorded(files, sidecar, idx_sha256)
    if "targets" in sidecar and not has_targets:
        raise UserError(
            f"corpus file {files.prefix}.idx must say of each sequence whether its tokens count, as {files.prefix}.json does, but "
            "has another size; copy it again"
        )
    tokenizer = sidecar.get("tokenizer_digest")
    return Recorded(
        sidecar["max_token_id"],
        tokenizer and sys.intern(tokenizer),
        sidecar.get("idx_sha256"),
        sidecar.get("bin_sha256"),
    )


def sidecar_of(files: Files) -> dict | None:
    """All that the sidecar says; None where there is none."""
    return read_sidecar(files.path(".json"), files.prefix + ".json") if files.have_sidecar else None


def read_sidecar(path: str | os.PathLike, called: str) -> dict:
    """What a sidecar holds. Sentences use `called` for the copy of a remote one."""
    with files_at(called):
        file = open_file(path)
        size = file.size
        content = file.read(0, size) if size <= LARGEST_SIDECAR else b""
    try:
        sidecar = parse_json(content)
    except ValueError:
        sidecar = None
    if not fits(sidecar, SIDECAR, SIGNED):
        raise UserError(f"corpus file {called} must describe its shard, but is unreadable; delete it or tokenize again")
    return sidecar


def check_recorded(files: Files, sidecar: dict, idx_sha256: str | None) -> None:
    """The files must be those of the sidecar: by the .bin's size, and the digest of the .idx if it was computed."""
    size, prefix = files.bin_bytes, files.prefix
    if sidecar.get("bin_bytes", size) != size:
        raise UserError(
            f"corpus file {prefix}.bin must hold the {sidecar['bin_bytes']} bytes that {prefix}.json records, but holds "
            f"{size}; copy it again"
        )
    if idx_sha256 and "idx_sha256" in sidecar:
        check_digest(prefix + ".idx", idx_sha256, sidecar["idx_sha256"])


def check_digest(path: str, found: str, recorded: str) -> None:
    """A UserError where the bytes are not those that were written."""
    if found != recorded:
        raise UserError(
            f"corpus file {path} must have the digest that its .json records ({recorded[:12]}…), but has {found[:12]}…; "
            "copy it again"
        )


def document_borders(index: ShardIndex) -> numpy.ndarray:
    """Where documents begin, in tokens, and at the end where the last one ends."""
    lengths = numpy.fromfile(index.files.path(".idx"), "<i4", index.sequences, offset=HEADER.size)
    borders = numpy.fromfile(
        index.files.path(".idx"), "<i8", index.documents + 1, offset=HEADER.size + 12 * index.sequences
    )
    ends = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
    sound = lengths.min() >= 0 and ends[-1] == index.tokens and borders[0] == 0 and (numpy.diff(borders) >= 0).all()
    if not sound:
        raise out_of_order(index.prefix + ".idx")
    return ends[borders]


def out_of_order(idx: str) -> UserError:
    return UserError(
        f"corpus file {idx} must hold lengths that add up to its tokens, and documents in rising order, but does not; {TOKENIZE}"
    )


def tokenizer_of(what: str, indices: list[ShardIndex]) -> tuple[str, str] | None:
    """(shard, digest) of the tokenizer of all shards that record one. It must be the same; `what` begins the sentence."""
    first = None
    for index in indices:
        digest = index.recorded and index.recorded.tokenizer_digest
        if digest and first and digest != first[1]:
            raise UserError(
                f"{what} must be written with one tokenizer, but {index.prefix} is written with another than {first[0]}; "
                "tokenize one of them again"
            )
        first = first or (digest and (index.prefix, digest)) or None
    return first


def check_vocabulary(index: ShardIndex, vocab_size: int) -> None:
    """Refuse a shard whose sidecar records an id outside the vocabulary. Without a sidecar the loader finds it later."""
    largest = index.recorded.max_token_id if index.recorded else -1
    if largest >= vocab_size:
        raise out_of_vocabulary(index.prefix, largest, vocab_size)


def out_of_vocabulary(prefix: str, token: int, vocab_size: int) -> UserError:
    """The sentence for a token that the model has no row for, wherever it is found."""
    return UserError(
        f"corpus shard {prefix} must hold token ids in 0..{vocab_size - 1} (vocabulary size {vocab_size}), "
        f"but holds {token}; tokenize it with the model's own tokenizer"
    )
