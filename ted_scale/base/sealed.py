"""A folder that is whole or not there: every file with size and digest in a manifest, durable before it has its name.

Knows nothing of checkpoints. Digests are taken of the bytes in memory on their way out, so that what a disk makes of
them is noticed. The surprise: all writing goes through os.write, os.fsync and os.rename, one call at a time, which is
where tests let the disk fail.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.errors import UserError, shown
from ted_scale.base.parsing import is_count, parse_json
from ted_scale.base.paths import checked_name

MANIFEST = "manifest.json"
PART = ".part"
ASIDE = f".old{PART}"
PIECE = 4 * 2**20
FORMAT = 1


class Entry(NamedTuple):
    bytes: int
    sha256: str


class Damaged(Exception):
    """What is wrong with a sealed folder, as the end of a sentence that names it."""


def write_file(path: Path, pieces: Iterable) -> Entry:
    """Bytes to disk for good. What stood there goes first, for it may be a second name of another folder's file."""
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


def sync(path: Path) -> None:
    """Make a folder's names, or a file that somebody else wrote, durable."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_durably(path: Path, text: str) -> None:
    """Whole or not at all, also over a power cut."""
    temporary = path.with_name(path.name + PART)
    write_file(temporary, [text.encode()])
    temporary.rename(path)
    sync(path.parent)


def read_pieces(path: Path):
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            yield piece


def digest_of(path: Path) -> Entry:
    digest, size = hashlib.sha256(), 0
    for piece in read_pieces(path):
        digest.update(piece)
        size += len(piece)
    return Entry(size, digest.hexdigest())


def link_or_copy(source: Path, target: Path) -> None:
    """A second name where the file system has them; the same bytes, and durable, in either case."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        write_file(target, read_pieces(source))


def seal(part: Path, files: dict[str, Entry], about: dict) -> None:
    """The manifest, last of all files: it holds its own digest, for a flipped bit may be in it, too."""
    content = {"format": FORMAT, **about, "files": {name: list(entry) for name, entry in sorted(files.items())}}
    text = json.dumps({"sha256": digest_of_content(content), "content": content})
    write_file(part / MANIFEST, [text.encode()])
    sync(part)


def digest_of_content(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def publish(part: Path) -> Path:
    """One rename gives a sealed folder its name; one that had it stands aside meanwhile, where `put_back` finds it. May be
    done again."""
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
    """What stood aside in `folder` when a crash came between two renames has its name again."""
    for aside in folder.glob(f"*{ASIDE}"):
        place = aside.with_name(aside.name.removesuffix(ASIDE))
        if not place.exists():
            aside.rename(place)


def remove(folder: Path) -> None:
    """Not there first, deleted second: what breaks off in between is a .part, not a torn folder with a good name."""
    doomed = folder.with_name(folder.name + ".gone" + PART)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_manifest(folder: Path) -> dict:
    """What was sealed, with `files` as entries by name; Damaged where that is no longer so."""
    try:
        return parse_manifest((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise Damaged(f"its {MANIFEST} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise Damaged(f"its {MANIFEST} is not one") from None


def parse_manifest(text: str) -> dict:
    try:
        outer = parse_json(text)
        content, digest = outer["content"], outer["sha256"]
        if digest != digest_of_content(content):
            raise Damaged(f"its {MANIFEST} is not as it was written")
        files = {name: Entry(*entry) for name, entry in content["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Damaged(f"its {MANIFEST} is not one") from None
    if content.get("format") != FORMAT:
        raise Damaged(f"its format is {content.get('format')} and this version reads {FORMAT}")
    for name, entry in files.items():
        if "/" in name or not is_count(entry.bytes) or not isinstance(entry.sha256, str):
            raise Damaged(f"its {MANIFEST} names {shown(name)}, which is no file in it")
        try:
            checked_name(name, MANIFEST)
        except UserError as error:
            raise Damaged(str(error)) from None
    return {**content, "files": files}


def check(folder: Path) -> dict:
    """The manifest, with every file there in its size; digests are `check_file`'s, which reads all bytes."""
    content = read_manifest(folder)
    for name, entry in content["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise Damaged(f"{name} is missing") from None
        if size != entry.bytes:
            raise Damaged(f"{name} has {size} bytes instead of {entry.bytes}")
    return content


def check_file(folder: Path, name: str, entry: Entry) -> None:
    try:
        found = digest_of(folder / name)
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from None
    if found != entry:
        raise Damaged(f"{name} is not as it was written")
