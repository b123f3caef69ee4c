"""A folder's disk: its room, and how fast it writes, syncs and reads back.

Note: what was just written is in memory, so the kernel is told to forget it before it is read; a file server may keep it
nevertheless.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from ted_scale.doctor.finding import NOTE, OK, Finding, size

PIECE, MOST, ENOUGH_S = 2**23, 2**28, 3.0  # bytes of a write and of all, and the time after which no more are written
DISK_S = 60
LEAST_FREE = 20 * 2**30


def check(folder: Path) -> list[Finding]:
    """Room for a checkpoint, and how fast files are written and read there: it writes one for some seconds."""
    usage = shutil.disk_usage(folder)
    said = f"{folder} has {size(usage.free)} free of {size(usage.total)}"
    way = "a checkpoint has 12 bytes a trained weight, and checkpoint.keep + 1 of them are there at a time"
    room = Finding("disk", OK, said) if usage.free >= LEAST_FREE else Finding("disk", NOTE, said, way)
    return [room, Finding("disk speed", OK, speeds(folder))]


def speeds(folder: Path) -> str:
    """The file is gone whatever happens."""
    handle, name = tempfile.mkstemp(prefix=".ted_scale_doctor_", dir=folder)
    try:
        written, write_s = write(handle)
        began = time.perf_counter()
        os.fsync(handle)
        sync_s = time.perf_counter() - began
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        read_s = read(handle)
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            Path(name).unlink()
    rates = f"writes {rate(written, write_s + sync_s)} with its fsync of {sync_s * 1e3:,.1f} ms, reads {rate(written, read_s)}"
    return f"{rates} ({written >> 20} MiB)"


def write(handle: int) -> tuple[int, float]:
    """(bytes, seconds)"""
    piece, written, began = os.urandom(PIECE), 0, time.perf_counter()
    while written < MOST and time.perf_counter() - began < ENOUGH_S:
        written += os.write(handle, piece)
    return written, time.perf_counter() - began


def read(handle: int) -> float:
    os.lseek(handle, 0, os.SEEK_SET)
    began = time.perf_counter()
    while os.read(handle, PIECE):
        pass
    return time.perf_counter() - began


def rate(bytes_: int, seconds: float) -> str:
    return f"{bytes_ / max(seconds, 1e-9) / 1e6:,.0f} MB/s"
