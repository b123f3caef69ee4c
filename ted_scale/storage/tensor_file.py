"""A safetensors file: written in pieces, and read in stretches, straight into memory that the caller has.

The library's reader maps a file and copies from the map while it holds Python's lock: when a file server pauses, no thread of
the process runs, and the process looks dead to others. Here a file is opened and read by system calls alone, during which
Python's lock is free. Note: a file may be anybody's. Its header is checked as the library checks it, before memory of a size
that it names is allocated.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ted_scale.base import progress
from ted_scale.base.errors import UserError, files_at, shown
from ted_scale.base.parsing import fits, is_count, parse_json
from ted_scale.base.paths import NoFile, open_file
from ted_scale.base.patience import patiently

LONGEST_HEADER, MOST_DIMENSIONS = 100_000_000, 64
PIECE = 4 * 2**20  # bytes of one call; also the most host memory that a read takes beside its targets
MOST_BUFFERS = 1024  # of one call: IOV_MAX
ABOUT = "__metadata__"
WAY_OUT = "look at its file system, and start the same command again"
Found = TypeVar("Found")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


class Broken(Exception):
    """What is wrong with a file, as the end of a sentence that names it."""


class Entry(NamedTuple):
    """A tensor in a file, and its bytes there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    entries: dict[str, Entry]  # by place in the file
    about: dict[str, str]


class Stretch(NamedTuple):
    """Elements of a flattened tensor from `first` on, as many as `target` takes, which is flat, of any device and dtype."""

    key: str
    first: int
    target: torch.Tensor


class Piece(NamedTuple):
    """A part of a stretch that one call reads."""

    begin: int
    end: int
    dtype: torch.dtype
    target: torch.Tensor


# Tensors to a file


def as_bytes(tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None) -> Iterable:
    """A file of fp32 tensors in host memory, in pieces, without a copy of the tensors."""
    header, end = {ABOUT: about} if about else {}, 0
    for key, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            yield memory_of(tensor.flatten())


def memory_of(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.detach().view(torch.uint8).numpy())


# A file's header


def header_of(path: Path) -> Header:
    return read(path, read_header)


def read(path: Path, action: Callable[[int], Found]) -> Found:
    """`action` with a descriptor, repeated while the file system fails. What is no whole safetensors file becomes a sentence."""
    try:
        with progress.reading(path):
            return patiently(partial(with_descriptor, action), path, WAY_OUT)
    except (Broken, FileNotFoundError) as error:
        reason = error if isinstance(error, Broken) else "it is not there"
        raise UserError(f"{path} must be a whole safetensors file, but is not: {reason}; copy it again") from None


def with_descriptor(action: Callable[[int], Found], path: Path) -> Found:
    try:
        descriptor = open_file(Path(os.path.realpath(path)))  # a model's file may be a link, as in the hub's folders
    except NoFile as error:
        raise Broken(f"it is {error}") from None
    except PermissionError:
        with files_at(path):
            raise
    try:
        return action(descriptor)
    finally:
        os.close(descriptor)


def read_header(descriptor: int) -> Header:
    size, first = os.fstat(descriptor).st_size, bytearray(8)
    read_exactly(descriptor, 0, [memoryview(first)])
    length = int.from_bytes(first, "little")
    if length > min(LONGEST_HEADER, size - len(first)):
        raise Broken(f"its header would have {length} bytes")
    text = bytearray(length)
    read_exactly(descriptor, len(first), [memoryview(text)])
    try:
        header = parse_json(text.decode("utf-8"))
    except ValueError as error:
        raise Broken(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise Broken("its header is no table")
    return Header(entries_of(header, len(first) + length, size), about_of(header))


def about_of(header: dict) -> dict[str, str]:
    about = header.get(ABOUT) or {}
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise Broken(f"its {ABOUT} is no table of texts")
    return about


def entries_of(header: dict, begin: int, size: int) -> dict[str, Entry]:
    """By place in the file, where they must lie one after another, without a gap, from the header to the end."""
    found = {key: entry_of(key, value, begin) for key, value in header.items() if key != ABOUT}
    found = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    places = [(begin, begin), *(entry[2:] for entry in found.values()), (size, size)]
    if any(end != following for (_, end), (following, _) in pairwise(places)):
        raise Broken("its tensors do not fill it")
    return found


def entry_of(key: str, value, begin: int) -> Entry:
    if not fits(value, {"dtype": str, "shape": list, "data_offsets": list}):
        raise Broken(f"{shown(key)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = DTYPES.get(value["dtype"]), value["shape"], value["data_offsets"]
    if dtype is None:
        raise Broken(f"{shown(key)} has a dtype that is not known here, {shown(value['dtype'])}")
    if len(shape) > MOST_DIMENSIONS or len(offsets) != 2 or not all(map(is_count, [*shape, *offsets])):
        raise Broken(f"{shown(key)} has no shape, or no place in it")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise Broken(f"{shown(key)} has another size than its shape says")
    return Entry(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


# A file to tensors


def fill(path: Path, choose: Callable[[dict[str, Entry]], Iterable[Stretch]]) -> None:
    """Read the stretches that are chosen from a file's entries, in the order of the file. Those that lie side by side are read
    by one call."""

    def action(descriptor: int) -> None:
        entries = read_header(descriptor).entries
        pieces = [piece for stretch in choose(entries) for piece in pieces_of(entries, stretch)]
        for batch in batches(sorted(pieces, key=lambda piece: piece.begin)):
            read_batch(descriptor, batch)

    read(path, action)


def pieces_of(entries: dict[str, Entry], stretch: Stretch) -> Iterator[Piece]:
    key, first, target = stretch
    entry, last = entries.get(key), first + target.numel()
    if entry is None or last > math.prod(entry.shape):
        raise Broken(f"it does not hold {last} numbers of {shown(key)}")
    size = entry.dtype.itemsize
    begin, most = entry.begin + first * size, PIECE // size
    for part in target.split(most) if last - first > most else (target,):
        end = begin + part.numel() * size
        yield Piece(begin, end, entry.dtype, part)
        begin = end


def batches(pieces: list[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    for piece in pieces:
        follows = batch and piece.begin == batch[-1].end and len(batch) < MOST_BUFFERS
        if batch and not (follows and piece.end - batch[0].begin <= PIECE):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def read_batch(descriptor: int, batch: list[Piece]) -> None:
    hosts = [host_memory(piece) for piece in batch]
    read_exactly(descriptor, batch[0].begin, [memory_of(host) for host in hosts])
    for host, piece in zip(hosts, batch, strict=True):
        if host is not piece.target:
            piece.target.copy_(host)


def host_memory(piece: Piece) -> torch.Tensor:
    """The target itself, if the bytes of the file are its own."""
    if piece.target.device.type == "cpu" and piece.target.dtype == piece.dtype:
        return piece.target
    return torch.empty(piece.target.numel(), dtype=piece.dtype, device="cpu")


def read_exactly(descriptor: int, begin: int, buffers: list[memoryview]) -> None:
    while any(buffers):
        count = os.preadv(descriptor, buffers, begin)
        if not count:
            raise Broken("it ends too early")
        progress.took(count)
        begin += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]
