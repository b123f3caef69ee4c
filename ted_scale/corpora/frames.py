"""The unpacked bytes of a .zst file, of one frame or of several.

Note: zstandard's own reader takes a file that was cut for one that ends there, and half of a text would be read without a word.
"""

import io
from typing import Any

PACKED = 1 << 12  # bytes unpacked at once: 4 bytes may stand for 128 KiB


class Frames(io.RawIOBase):
    def __init__(self, raw: io.BufferedReader, unpacker: Any):
        """`unpacker()` is a zstandard decompressobj."""
        self.raw, self.unpacker = raw, unpacker
        self.frame: Any = None
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready and (packed := self.next_packed()):
            if not self.frame or self.frame.eof:
                self.frame = self.unpacker()
            self.ready = memoryview(self.frame.decompress(packed))
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def next_packed(self) -> bytes:
        """What the last frame left, or more of the file. An EOFError where a frame has no end."""
        left = self.frame.unused_data if self.frame and self.frame.eof else b""
        if packed := left or self.raw.read(PACKED):
            return packed
        if self.frame and not self.frame.eof:
            raise EOFError("it ends within a frame")
        return b""
