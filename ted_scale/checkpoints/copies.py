"""Copies of checkpoints under s3://: which there are, which are whole, and how files are uploaded and downloaded.

copier.py decides which checkpoint is copied. A copy is fetched if the run's folder has no whole checkpoint that is as new.
Requests, credentials and their errors are in storage/. Note: the manifest is the last object of a copy, so a copy without a
manifest does not count. If the objects of a copy do not have the sizes in its manifest, it is damaged, like a checkpoint on disk.
"""

import contextlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ted_scale.base import beneath, sealed
from ted_scale.base.errors import files_at
from ted_scale.base.sealed import MANIFEST, Damaged
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import PROGRESS, Progress, parse_progress
from ted_scale.storage import objects, transfers
from ted_scale.storage.objects import Object
from ted_scale.storage.retries import Missing

FETCHED = ".fetched"  # the suffix of a checkpoint that is being downloaded; a later start continues with its files


class Copy(NamedTuple):
    """A copy and what is wrong with it, by its manifest and the sizes of its objects. A copy that was never whole has no
    manifest, and nothing is wrong with it."""

    manifest: dict | None
    objects: dict[str, Object]
    fault: str | None

    @property
    def is_whole(self) -> bool:
        return self.manifest is not None and self.fault is None


def place_of(run) -> str:
    return f"{run.checkpoint.copy_to.rstrip('/')}/{run.name}/checkpoints" if run.checkpoint.copy_to else ""


# Upload


def make_way(checkpoint: Path, place: str) -> bool:
    """Whether a checkpoint must be sent. If the store has another manifest under this name, it is removed first: with it, a half
    replaced copy would look whole."""
    there = copy_of(place, checkpoint.name)
    if there.is_whole and there.manifest == sealed.read_manifest(checkpoint):
        return False
    if MANIFEST in there.objects:
        remove(place, checkpoint.name, {MANIFEST: there.objects[MANIFEST]})
    return True


def send(checkpoint: Path, place: str, names: list[str]) -> None:
    """Upload these files. The manifest must be sent alone and last, after the files of all ranks, because it makes a copy whole."""
    digests = {name: entry.sha256 for name, entry in sealed.read_manifest(checkpoint)["files"].items()}
    for name in names:
        url = f"{place}/{checkpoint.name}/{name}"
        digest = digests.get(name) or sealed.digest_of(checkpoint / name).sha256
        transfers.upload(checkpoint / name, url, digest, f"checkpoint {url} must be written", objects.COPYING_S)


def remove(place: str, name: str, found: dict[str, Object]) -> None:
    """Remove a copy, the manifest first. If this is interrupted, the rest does not count as a checkpoint."""
    for file in sorted(found, key=lambda name: name != MANIFEST):
        objects.delete(found[file].url, f"checkpoint {place}/{name} must be removed", objects.COPYING_S)


# List


def names(place: str) -> list[str]:
    """The names of the copies, newest first. Some copies may not be whole."""
    what = f"checkpoint.copy_to {place} must be listed"
    found = objects.folders(place, what, objects.OPENING_S)
    return sorted(filter(files.key_of, found), key=files.key_of, reverse=True)


def copy_of(place: str, name: str) -> Copy:
    return judged(name, objects.tree(f"{place}/{name}", f"checkpoint {place}/{name} must be listed", objects.COPYING_S))


def all_copies(place: str) -> dict[str, Copy]:
    """All copies by name. This needs one listing."""
    found: dict[str, dict[str, Object]] = {}
    for path, thing in objects.tree(place, f"checkpoint.copy_to {place} must be listed", objects.COPYING_S).items():
        name, _, file = path.partition("/")
        if files.key_of(name):
            found.setdefault(name, {})[file] = thing
    return {name: judged(name, there) for name, there in found.items()}


def judged(name: str, there: dict[str, Object]) -> Copy:
    """The copy, checked by the sizes of its objects. Their bytes are checked when they are read."""
    try:
        manifest = manifest_in(there[MANIFEST], name)
    except (KeyError, Missing):
        return Copy(None, there, None)
    except Damaged as damage:
        return Copy(None, there, f"its copy: {damage}")
    for file, entry in manifest["files"].items():
        size = there[file].size if file in there else None
        if size != entry.bytes:
            wrong = "is missing" if size is None else f"has {size} bytes instead of {entry.bytes}"
            return Copy(manifest, there, f"its copy: {file} {wrong}")
    return Copy(manifest, there, None)


@lru_cache(maxsize=256)
def manifest_in(thing: Object, name: str) -> dict:
    return files.checked(sealed.parse_manifest(text_of(thing)), name)


def progress_of(copy: Copy) -> Progress:
    thing = copy.objects[PROGRESS]
    return parse_progress(text_of(thing), thing.url)


def text_of(thing: Object) -> str:
    return objects.text(thing, f"checkpoint {thing.url} must be read", objects.COPYING_S)


def prune(place: str, settings) -> None:
    """Remove the copies that `files.prune` would remove, and unfinished copies of earlier processes. Damaged copies stay, because
    the user should look at them, and a later version may have written them."""
    there = all_copies(place)
    whole = {name: copy.manifest for name, copy in there.items() if copy.is_whole}
    newest = max(map(files.key_of, whole), default=(0, 0))
    torn = {name for name, copy in there.items() if copy.manifest is None and copy.fault is None}
    for name in {name for name in torn if files.key_of(name) < newest} | (whole.keys() - files.kept(whole, settings)):
        remove(place, name, there[name].objects)
    transfers.abort(place, f"uploads to {place} must be removed", objects.COPYING_S)


# Download


def fetch(copy: Copy, folder: Path, names: list[str]) -> str | None:
    """Download files of a copy and compare them with its manifest. Returns what is wrong with them. An error of the store is not
    damage, so it raises."""
    with files_at(folder):
        beneath.make_folder(folder)
        faults = (fetch_file(copy.objects[name], folder, name, copy.manifest["files"][name]) for name in names)
        return next(filter(None, faults), None)


def fetch_file(thing: Object, folder: Path, name: str, entry: sealed.Entry | None) -> str | None:
    """Download a file, or continue an earlier process's download. If a continued file is wrong, its beginning came from another
    object, and it is downloaded again."""
    while True:
        try:
            goes_on = transfers.download(
                thing, folder / name, f"checkpoint {thing.url} must be read", objects.COPYING_S
            )
            if entry:
                sealed.check_file(folder, name, entry)
            return None
        except Missing:
            return f"its copy: {name} is missing"
        except Damaged as damage:
            beneath.unlink(folder / name)
            if not goes_on:
                return f"its copy: {damage}"


def publishable(copy: Copy, folder: Path, part: Path) -> str | None:
    """Download the manifest of a fetched checkpoint, as the last file, and rename its folder to `part`. Returns what is wrong."""
    if fault := fetch_file(copy.objects[MANIFEST], folder, MANIFEST, None):
        return fault
    beneath.discard(part)
    beneath.rename(folder, part)
    return None


def forget_fetched(checkpoints: Path) -> None:
    """Remove what earlier downloads left."""
    with contextlib.suppress(OSError):
        for left in checkpoints.glob(f"*{FETCHED}"):
            beneath.discard(left)
