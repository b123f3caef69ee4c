"""A sealed folder: a manifest names every file with its size and digest, so that a damaged one is known.

durable.py writes the files and renames the folder. Damage is what a name, a size or a digest proves; an error of the file
system proves nothing: patience.py tries again, and raises Gone. Note: the manifest holds a digest of itself, too.
"""

import hashlib
import json
import os
from pathlib import Path

from ted_scale.base import progress
from ted_scale.base.durable import PIECE, Entry, sync, write_file
from ted_scale.base.errors import UserError, shown
from ted_scale.base.parsing import is_count, parse_json
from ted_scale.base.paths import NoFile, checked_name, open_file, refuse_no_file
from ted_scale.base.patience import patiently

MANIFEST = "manifest.json"
FORMAT = 1
LARGEST_TEXT = 2**28  # bytes; the manifest of 100,000 ranks has a tenth
WAY_OUT = (
    "start the same command again; if this stays (a bad block of the disk), let `ted-scale checkpoints RUN verify` show which "
    "checkpoints cannot be read, and move them away"
)


class Damaged(Exception):
    """What is wrong with a sealed folder, as the end of a sentence that names it."""


def digest_of(path: Path) -> Entry:
    """Reads the whole file, and tells progress of each piece."""
    digest, size = hashlib.sha256(), 0
    with progress.reading(path), os.fdopen(open_file(path), "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            progress.took(len(piece))
            size += len(piece)
    return Entry(size, digest.hexdigest())


def size_of(path: Path) -> int:
    return refuse_no_file(path.lstat()).st_size


def seal(part: Path, files: dict[str, Entry], about: dict) -> None:
    """Write the manifest, last of all files. It holds its own digest, because a bit may flip in it, too."""
    content = {"format": FORMAT, **about, "files": {name: list(entry) for name, entry in sorted(files.items())}}
    text = json.dumps({"sha256": digest_of_content(content), "content": content})
    write_file(part / MANIFEST, [text.encode()])
    sync(part)


def digest_of_content(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict:
    """What was sealed, with `files` as entries by name; Damaged if the manifest is not as it was written."""
    try:
        return parse_manifest(read(folder, MANIFEST, read_text))
    except UnicodeDecodeError:
        raise Damaged(f"its {MANIFEST} is not one") from None


def read_text(path: Path) -> str:
    """Of a small file; one above LARGEST_TEXT is Damaged."""
    with os.fdopen(open_file(path), "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_TEXT:
            raise Damaged(f"{path.name} has more than {LARGEST_TEXT} bytes")
        return file.readall().decode()


def read(folder: Path, name: str, action):
    """`action` with a file of the folder; Damaged if it is not there or no file, Gone if it cannot be read."""
    try:
        return patiently(action, folder / name, WAY_OUT)
    except FileNotFoundError:
        raise Damaged(f"it has no {name}" if name == MANIFEST else f"{name} is missing") from None
    except NoFile as error:
        raise Damaged(f"{name} is {error}") from None


def parse_manifest(text: str) -> dict:
    """Its content. Damaged if the digest is wrong, if it is of another format, or if it names what is no file of the folder."""
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
    """The manifest, if every file is there and has its size. `check_file` checks digests, which reads all bytes."""
    content = read_manifest(folder)
    for name, entry in content["files"].items():
        check_size(folder, name, entry)
    return content


def check_size(folder: Path, name: str, entry: Entry) -> None:
    size = read(folder, name, size_of)
    if size != entry.bytes:
        raise Damaged(f"{name} has {size} bytes instead of {entry.bytes}")


def check_file(folder: Path, name: str, entry: Entry) -> None:
    check_size(folder, name, entry)
    if read(folder, name, digest_of) != entry:
        raise Damaged(f"{name} is not as it was written")
