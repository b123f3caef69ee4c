"""Chunks of objects on local disk: one sparse file of fixed slots, shared without locks by all processes of a node.

A chunk may be in any slot of one set; a new one takes the least recently used slot of its set. A slot's header names the
chunk, the object and its version, and holds a checksum of the bytes. Two processes that write one slot at once, or one that
is killed while it writes, leave a wrong checksum, and then the chunk counts as absent. Note: the file's geometry is not
recorded, because headers that another geometry wrote match no chunk.
"""

import hashlib
import logging
import os
import struct
import time
import zlib
from pathlib import Path
from typing import NamedTuple

from ted_scale.storage.objects import Object

log = logging.getLogger("ted_scale")
HEADER = struct.Struct("<32sIIQ16x")  # key, length, crc32, nanoseconds of the last use
WAYS = 16
PAGE = 4096
SPARE = 100  # one part in so many of the bound is left to the file system's own records


class Geometry(NamedTuple):
    sets: int
    ways: int
    chunk: int

    @property
    def table(self) -> int:
        """Bytes of all headers, which come before the first slot."""
        return -(-self.sets * self.ways * HEADER.size // PAGE) * PAGE

    @property
    def size(self) -> int:
        return self.table + self.sets * self.ways * self.chunk


def geometry(bound: int, chunk: int) -> Geometry:
    """The most slots within a bound of bytes."""
    slots = max(0, bound - bound // SPARE - PAGE) // (chunk + HEADER.size)
    ways = min(WAYS, slots)
    return Geometry(slots // ways if ways else 0, ways, chunk)


def key_of(thing: Object, number: int, chunk: int) -> bytes:
    return hashlib.sha256(f"{thing.url}\0{thing.version}\0{thing.size}\0{chunk}\0{number}".encode()).digest()


class ChunkCache:
    """Without room, or on a disk that fails, it holds nothing and logs that once."""

    def __init__(self, path: Path, bound: int, chunk: int):
        self.path, self.shape = path, geometry(bound, chunk)
        self.usable = bool(self.shape.sets)
        if not self.usable:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(self.file).st_size != self.shape.size:
                os.ftruncate(self.file, self.shape.size)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning(f"chunks are not kept on disk, because {self.path} cannot be used: {error.strerror}")
        self.usable = False  # the descriptor stays open: another thread may use it

    def _headers(self, key: bytes) -> tuple[int, list[tuple]]:
        """(first slot of the key's set, the set's headers)."""
        ways = self.shape.ways
        first = int.from_bytes(key[:8], "little") % self.shape.sets * ways
        table = os.pread(self.file, ways * HEADER.size, first * HEADER.size).ljust(ways * HEADER.size, b"\0")
        return first, list(HEADER.iter_unpack(table))

    def _place(self, slot: int) -> int:
        return self.shape.table + slot * self.shape.chunk

    def get(self, key: bytes) -> bytes | None:
        if not self.usable:
            return None
        try:
            first, headers = self._headers(key)
            for slot, (found, length, crc, _) in enumerate(headers, first):
                if found == key and length <= self.shape.chunk:
                    content = os.pread(self.file, length, self._place(slot))
                    if zlib.crc32(content) == crc:
                        self._write_header(slot, key, length, crc)
                        return content
        except OSError as error:
            self._give_up(error)
        return None

    def put(self, key: bytes, content: bytes) -> None:
        if not self.usable:
            return
        try:
            first, headers = self._headers(key)
            # A header with this key is of a chunk that was half written, or that another process wrote meanwhile.
            way = min(range(len(headers)), key=lambda w: (headers[w][0] != key, headers[w][3]))
            os.pwrite(self.file, content, self._place(first + way))
            self._write_header(first + way, key, len(content), zlib.crc32(content))
        except OSError as error:
            self._give_up(error)

    def _write_header(self, slot: int, key: bytes, length: int, crc: int) -> None:
        os.pwrite(self.file, HEADER.pack(key, length, crc, time.time_ns()), slot * HEADER.size)
