"""A sealed folder: a manifest names every file with its size and digest, so that a damaged one is known.

durable.py writes the files and renames the folder; this file knows nothing of checkpoints. Note: the manifest holds a digest
of itself, too.
"""

import hashlib
import json
from pathlib import Path

from ted_scale.base.durable import Entry, sync, write_file
from ted_scale.base.errors import UserError, shown
from ted_scale.base.parsing import is_count, parse_json
from ted_scale.base.paths import checked_name

MANIFEST = "manifest.json"
FORMAT = 1


class Damaged(Exception):
    """What is wrong with a sealed folder, as the end of a sentence that names it."""


def digest_of(path: Path) -> Entry:
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return Entry(file.tell(), digest.hexdigest())


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
    """The manifest, if every file is there and has its size. `check_file` checks digests, which reads all bytes."""
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
