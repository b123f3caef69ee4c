"""Files and folders that are whole or not there, also after a power cut: written aside, synced, then renamed.

All writing goes through os.write, os.fsync and os.rename, one call at a time, because that is where tests let the disk
fail, and below a run's folder it passes no link (beneath.py). Digests are taken of the bytes in memory on their way out, so
that what a disk makes of them is noticed.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ted_scale.base import beneath
from ted_scale.base.beneath import discard, is_there, rename

PART = ".part"  # ends the name of what is not whole yet
ASIDE = f".old{PART}"
PIECE = 4 * 2**20


class Entry(NamedTuple):
    bytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable) -> Entry:
    """Bytes to disk for good. An older file goes first."""
    digest, size = hashlib.sha256(), 0
    target = beneath.make_new(path)
    try:
        for piece in pieces:
            left = memoryview(piece).cast("B")
            while len(left):
                written = os.write(target, left[:PIECE])
                digest.update(left[:written])
                size, left = size + written, left[written:]
        os.fsync(target)
    finally:
        os.close(target)
    return Entry(size, digest.hexdigest())


def write_durably(path: Path, content: str | Iterable) -> None:
    """The file is there with all of its content or not at all, also after a power cut."""
    temporary = path.with_name(path.name + PART)
    write_file(temporary, [content.encode()] if isinstance(content, str) else content)
    rename(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a folder's names, or a file that other code wrote, durable."""
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_pieces(path: Path):
    """The bytes of a file, a PIECE at a time, so that gigabytes need no memory."""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            yield piece


def link_or_copy(source: Path, target: Path) -> None:
    """A second name where the file system has them; the same bytes, and durable, in either case."""
    beneath.unlink(target)
    with beneath.opened(target.parent) as at, contextlib.suppress(OSError):
        os.link(source, target.name, dst_dir_fd=at, follow_symlinks=False)
        return
    write_file(target, read_pieces(source))


def publish(part: Path) -> Path:
    """One rename gives a folder its name. A folder that had it is moved aside meanwhile, where `put_back` finds it. May be
    repeated."""
    place = part.with_name(part.name.removesuffix(PART))
    aside = place.with_name(place.name + ASIDE)
    if is_there(part):
        if is_there(place):
            discard(aside)
            rename(place, aside)
        rename(part, place)
    sync(place.parent)
    if not is_there(place):
        raise FileNotFoundError(errno.ENOENT, "somebody has removed it", str(part))
    discard(aside)
    return place


def put_back(folder: Path) -> None:
    """Folders that `publish` had moved aside when a crash came between its two renames get their names back."""
    for aside in folder.glob(f"*{ASIDE}"):
        place = aside.with_name(aside.name.removesuffix(ASIDE))
        if not is_there(place):
            rename(aside, place)


def remove(folder: Path) -> None:
    """Renamed first, then deleted: a crash in between leaves a .part, not half a folder under a good name."""
    doomed = folder.with_name(folder.name + ".gone" + PART)
    discard(doomed)
    rename(folder, doomed)
    discard(doomed)
