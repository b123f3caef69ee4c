"""Copies of checkpoints under s3://. Each checkpoint is copied when it is published; a copy is fetched if the run's folder has
no whole checkpoint that is as new.

Copying runs in the background, during training and during the next save, one copy at a time. A checkpoint that is published
while an earlier one is still being copied gets no copy; the next one does. Requests, credentials and their sentences are in
objects.py. Note: the manifest is the last object of a copy, so a copy without a manifest does not count.
"""

import contextlib
import threading
from pathlib import Path

import torch.distributed as dist

from ted_scale.base import durable, sealed
from ted_scale.base.errors import files_at
from ted_scale.base.sealed import MANIFEST, Damaged
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.attempts import Failure, attempt, warn_of_old_ones
from ted_scale.checkpoints.progress import PROGRESS, Progress, parse_progress
from ted_scale.ranks import pulse
from ted_scale.ranks.agree import first_of_all, new_group
from ted_scale.storage import objects


class Copier:
    """Copies in a thread of its own, on every rank. `alert(title, text)` alerts the user."""

    def __init__(self, run, alert):
        self.place, self.settings, self.alert = place_of(run), run.checkpoint, alert
        self.group, self.thread, self.name, self.failed, self.manifests = new_group(), None, "", 0, {}

    def is_copying(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def begin(self, checkpoint: Path, names: list[str]) -> None:
        """Every rank copies the files that it wrote."""
        self.name = checkpoint.name
        self.thread = threading.Thread(target=self.run_thread, args=(checkpoint, names), daemon=True, name="copy")
        self.thread.start()

    def finish(self) -> None:
        """Wait for the copy. This ends: requests have time limits, and the death of another rank ends this one."""
        while self.is_copying():
            pulse.doing(f"the copy of {self.name}")
            self.thread.join(1)

    def run_thread(self, checkpoint: Path, names: list[str]) -> None:
        with contextlib.suppress(Exception):
            if failure := self.copy(checkpoint, names):
                self.alert_no_copy(checkpoint, failure)
            elif dist.get_rank() == 0:
                failure, _ = attempt(prune, self.place, self.manifests, self.settings)
                warn_of_old_ones(self.place, failure)

    def copy(self, checkpoint: Path, names: list[str]) -> Failure | None:
        """All ranks' files first, the manifest last."""
        failure, _ = attempt(send, checkpoint, self.place, names)
        failure = first_of_all(failure, self.group)
        if not failure and dist.get_rank() == 0:
            failure, _ = attempt(send, checkpoint, self.place, [MANIFEST])
        return failure

    def alert_no_copy(self, checkpoint: Path, failure: Failure) -> None:
        self.failed += 1
        if dist.get_rank() == 0:
            self.alert(
                "a checkpoint was not copied", f"{checkpoint.name} has no copy; the run goes on: {failure.reason}"
            )


def place_of(run) -> str:
    return f"{run.checkpoint.copy_to.rstrip('/')}/{run.name}/checkpoints" if run.checkpoint.copy_to else ""


def send(checkpoint: Path, place: str, names: list[str]) -> None:
    for name in names:
        url = f"{place}/{checkpoint.name}/{name}"
        objects.upload(checkpoint / name, url, f"checkpoint {url} must be written", objects.COPYING_S)


def remove(place: str, name: str) -> None:
    """The manifest first: if this is interrupted, the rest does not count as a checkpoint."""
    folder = f"{place}/{name}"
    found = objects.listed(folder, "", objects.COPYING_S)
    for file in sorted(found, key=lambda name: name != MANIFEST):
        objects.delete(f"{folder}/{file}", f"checkpoint {folder} must be removed", objects.COPYING_S)


def names(place: str) -> list[str]:
    """Newest first. Some of them may have no manifest yet."""
    what = f"checkpoint.copy_to {place} must be listed"
    found = objects.folders(place, what, objects.OPENING_S)
    return sorted(filter(files.key_of, found), key=files.key_of, reverse=True)


def manifest_of(place: str, name: str) -> dict | None:
    """None if the copy was never whole; Damaged if its manifest is not valid any more."""
    url = f"{place}/{name}/{MANIFEST}"
    text = objects.text(url, f"checkpoint {url} must be read", objects.COPYING_S)
    return None if text is None else files.checked(sealed.parse_manifest(text), name)


def progress_of(place: str, name: str) -> Progress:
    url = f"{place}/{name}/{PROGRESS}"
    text = objects.text(url, f"checkpoint {url} must be read", objects.COPYING_S)
    return parse_progress(text or "", url)


def prune(place: str, known: dict[str, dict], settings) -> None:
    """Remove the copies that `files.prune` would remove. `known` keeps the manifests that were read."""
    there, torn = names(place), []
    for name in set(there) - known.keys():
        with contextlib.suppress(Damaged):  # a person should look at it; a later version may have written it
            if (manifest := manifest_of(place, name)) is None:
                torn.append(name)
            else:
                known[name] = manifest
    whole = {name: known[name] for name in there if name in known}
    newest = max(map(files.key_of, whole), default=(0, 0))
    doomed = {name for name in torn if files.key_of(name) < newest}  # an earlier process exited while it copied
    for name in doomed | (whole.keys() - files.kept(whole, settings)):
        remove(place, name)


def fetch(place: str, part: Path, manifest: dict, names: list[str]) -> str | None:
    """Download files of a copy and compare them with its manifest; return what is wrong with them. An error of the store is
    not damage: it raises."""
    with files_at(part):
        part.mkdir(parents=True, exist_ok=True)
        for name in names:
            fetch_file(place, part, name)
    try:
        for name in names:
            sealed.check_file(part, name, manifest["files"][name])
    except Damaged as damage:
        return str(damage)
    return None


def fetch_file(place: str, part: Path, name: str) -> None:
    url = f"{place}/{part.name.removesuffix(durable.PART)}/{name}"
    objects.download(url, part / name, f"checkpoint {url} must be read", objects.COPYING_S)
    durable.sync(part / name)
