"""Files and folders that are whole or not there, also after a power cut: written aside, synced, then renamed.

All writing goes through os.write, os.fsync and os.rename, one call at a time, because that is where tests let the disk
fail. Digests are taken of the bytes in memory on their way out, so that what a disk makes of them is noticed.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PART = ".part"  # ends the name of what is not whole yet
ASIDE = f".old{PART}"
PIECE = 4 * 2**20


class Entry(NamedTuple):
    bytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable) -> Entry:
    """Bytes to disk for good. An older file goes first: it may be a second name of another folder's file."""
    digest, size = hashlib.sha256(), 0
    path.unlink(missing_ok=True)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
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
    temporary.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a folder's names, or a file that other code wrote, durable."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_pieces(path: Path):
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            yield piece


def link_or_copy(source: Path, target: Path) -> None:
    """A second name where the file system has them; the same bytes, and durable, in either case."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        write_file(target, read_pieces(source))


def publish(part: Path) -> Path:
    """One rename gives a folder its name. A folder that had it is moved aside meanwhile, where `put_back` finds it. May be
    repeated."""
    place = part.with_name(part.name.removesuffix(PART))
    aside = place.with_name(place.name + ASIDE)
    if part.exists():
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
        part.rename(place)
    sync(place.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return place


def put_back(folder: Path) -> None:
    """Folders that `publish` had moved aside when a crash came between its two renames get their names back."""
    for aside in folder.glob(f"*{ASIDE}"):
        place = aside.with_name(aside.name.removesuffix(ASIDE))
        if not place.exists():
            aside.rename(place)


def remove(folder: Path) -> None:
    """Renamed first, then deleted: a crash in between leaves a .part, not half a folder under a good name."""
    doomed = folder.with_name(folder.name + ".gone" + PART)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
