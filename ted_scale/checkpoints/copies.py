"""A run's checkpoints under s3://: copied as they are published, fetched where the run's folder has none as new.

Requests, credentials and their sentences are objects.py's. The surprise: a copy's manifest is its last object, so
that one without is not there, and a fetched one is held against it like any other.
"""

import contextlib
from pathlib import Path

from ted_scale.base import durable, sealed
from ted_scale.base.errors import files_at
from ted_scale.base.sealed import MANIFEST, Damaged
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import PROGRESS, Progress, parse_progress
from ted_scale.storage import objects


def place_of(run) -> str:
    return f"{run.checkpoint.copy_to.rstrip('/')}/{run.name}/checkpoints" if run.checkpoint.copy_to else ""


def send(checkpoint: Path, place: str, names: list[str]) -> None:
    for name in names:
        url = f"{place}/{checkpoint.name}/{name}"
        objects.upload(checkpoint / name, url, f"checkpoint {url} must be written", objects.COPYING_S)


def remove(place: str, name: str) -> None:
    """The manifest first: what breaks off in between is no checkpoint."""
    folder = f"{place}/{name}"
    found = objects.listed(folder, "", objects.COPYING_S)
    for thing in sorted(found, key=lambda name: name != MANIFEST):
        objects.delete(f"{folder}/{thing}", f"checkpoint {folder} must be removed", objects.COPYING_S)


def names(place: str) -> list[str]:
    """Newest first; one whose manifest is not there yet may be among them."""
    what = f"checkpoint.copy_to {place} must be listed"
    found = objects.folders(place, what, objects.OPENING_S)
    return sorted(filter(files.key_of, found), key=files.key_of, reverse=True)


def manifest_of(place: str, name: str) -> dict | None:
    """None where the copy was never whole; Damaged where its manifest is no longer one."""
    url = f"{place}/{name}/{MANIFEST}"
    text = objects.text(url, f"checkpoint {url} must be read", objects.COPYING_S)
    return None if text is None else files.checked(sealed.parse_manifest(text), name)


def progress_of(place: str, name: str) -> Progress:
    url = f"{place}/{name}/{PROGRESS}"
    text = objects.text(url, f"checkpoint {url} must be read", objects.COPYING_S)
    return parse_progress(text or "", url)


def prune(place: str, known: dict[str, dict], settings) -> None:
    """As `files.prune`, there; `known` keeps the manifests that were read."""
    there, torn = names(place), []
    for name in set(there) - known.keys():
        with contextlib.suppress(Damaged):  # to be looked at, and perhaps of a later version
            if (manifest := manifest_of(place, name)) is None:
                torn.append(name)
            else:
                known[name] = manifest
    whole = {name: known[name] for name in there if name in known}
    newest = max(map(files.key_of, whole), default=(0, 0))
    doomed = {name for name in torn if files.key_of(name) < newest}  # what a run that left did not wait for
    for name in doomed | (whole.keys() - files.kept(whole, settings)):
        remove(place, name)


def fetch(place: str, part: Path, manifest: dict, names: list[str]) -> str | None:
    """Files of a copy, as its manifest says they are; what is wrong with them. A store that fails is no damage: it raises."""
    with files_at(part):
        part.mkdir(parents=True, exist_ok=True)
        for name in names:
            take(place, part, name)
    try:
        for name in names:
            sealed.check_file(part, name, manifest["files"][name])
    except Damaged as damage:
        return str(damage)
    return None


def take(place: str, part: Path, name: str) -> None:
    url = f"{place}/{part.name.removesuffix(durable.PART)}/{name}"
    objects.download(url, part / name, f"checkpoint {url} must be read", objects.COPYING_S)
    durable.sync(part / name)
