"""A run's checkpoints as files: their names, which one is the newest whole one, and which are kept.

This needs no process group and no DeepSpeed, so a wrong resume is refused before either starts. No file says which checkpoint is
the newest. The names in the folder do, and each checkpoint's manifest (sealed.py) shows whether it is whole. Note: the newest
checkpoint does not always have the highest step. A run goes back after a loss spike or past a damaged checkpoint. It then starts
a new line, whose number is part of the name: step_00000007_1 is newer than step_00000008.
"""

import math
import re
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from ted_scale.base import beneath, durable, sealed
from ted_scale.base.durable import PART
from ted_scale.base.errors import UserError, files_at
from ted_scale.base.parsing import is_count
from ted_scale.base.paths import NoFile
from ted_scale.base.patience import patiently
from ted_scale.base.redact import printable
from ted_scale.base.sealed import Damaged

FILTERS = "filters.safetensors"


class Published(NamedTuple):
    """A published checkpoint, and what is wrong with it, by its manifest and the sizes of its files."""

    path: Path
    manifest: dict | None
    fault: str | None

    @property
    def step(self) -> int:
        return key_of(self.path.name)[1]


def checkpoints_of(folder: Path) -> Path:
    return folder / "checkpoints"


def filters_of(folder: Path) -> Path:
    """The file with the filters from which stage II starts."""
    return folder / FILTERS


def checkpoint_name(step: int, line: int = 0) -> str:
    return f"step_{step:08d}" + (f"_{line}" if line else "")


def key_of(name: str) -> tuple[int, int] | None:
    """(line, step) of a checkpoint's name, by which checkpoints are sorted. None if it is not a checkpoint's name."""
    found = re.fullmatch(r"step_([0-9]{8,15})(?:_([1-9][0-9]{0,8}))?", name)
    return (int(found[2] or 0), int(found[1])) if found else None


def listed(folder: Path) -> list[Path]:
    """All paths with the name of a checkpoint, newest first. Gone if the folder cannot be read."""
    try:
        names = patiently(lambda place: names_in(folder, place), checkpoints_of(folder), sealed.WAY_OUT)
    except FileNotFoundError:
        names = []
    return [checkpoints_of(folder) / name for name in sorted(filter(key_of, names), key=key_of, reverse=True)]


def names_in(folder: Path, checkpoints: Path) -> list[str]:
    """The names in the folder of checkpoints. If the run has no folder yet there are none, and this does not wait: only what is
    missing in an existing folder may appear a moment later."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path.name for path in checkpoints.iterdir()]


def published(folder: Path) -> list[Published]:
    """The published checkpoints, newest first. This reads manifests and sizes; `check_digests` reads everything. Gone if a
    checkpoint cannot be read."""
    return [look_at(path) for path in listed(folder)]


def first_whole(folder: Path, check=sealed.check) -> tuple[Published | None, list[Published]]:
    """(the newest whole checkpoint, the newer ones that are damaged). `check` decides. Older checkpoints are not looked at."""
    damaged = []
    for path in listed(folder):
        if (found := look_at(path, check)).fault is None:
            return found, damaged
        damaged.append(found)
    return None, damaged


def look_at(checkpoint: Path, check=sealed.check) -> Published:
    """A checkpoint and its damage. An error of the file system proves no damage, so it is raised."""
    try:
        return Published(checkpoint, checked(check(checkpoint), checkpoint.name), None)
    except Damaged as damage:
        return Published(checkpoint, None, str(damage))


def checked(manifest: dict, name: str) -> dict:
    """The manifest, if it belongs to the checkpoint with this name. Otherwise raises Damaged."""
    if (key := key_of(name)) is None:
        raise Damaged(
            f"its folder is named {name}, which is no checkpoint's name: rename it back to step_ and its step"
        )
    (line, step), forks, scores = key, manifest.get("forks"), manifest.get("scores", {})
    lines = isinstance(forks, list) and len(forks) == line and all(map(is_count, forks))
    loss = manifest.get("validation")
    measured = isinstance(scores, dict) and all(isinstance(number, float) for number in scores.values())
    measured = measured and (loss is None or isinstance(loss, float))
    if not (lines and manifest.get("step") == step and measured):
        raise Damaged(f"its {sealed.MANIFEST} is not of {name}")
    return manifest


def history(whole: dict[str, dict]) -> list[str]:
    """The newest of these whole checkpoints (manifest by name), and the ones that it continues, newest first."""
    names = sorted(whole, key=key_of, reverse=True)
    forks = whole[names[0]]["forks"] if names else []
    return [name for name in names if key_of(name)[1] <= min(forks[key_of(name)[0] :], default=key_of(name)[1])]


def check_digests(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Read a checkpoint's files and return what is wrong with them. With a share (rank, ranks), each rank reads some of them."""
    try:
        files = checked(sealed.read_manifest(checkpoint), checkpoint.name)["files"]
        for name in list(files)[share[0] :: share[1]]:
            sealed.check_file(checkpoint, name, files[name])
    except Damaged as damage:
        return str(damage)
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. If all checkpoints are damaged, this raises: the run must not silently start again."""
    whole, damaged = first_whole(folder)
    if damaged and whole is None:
        raise none_is_whole(folder, [(c.path, c.fault) for c in damaged])
    return whole and whole.path


def renamed(folder: Path) -> list[str]:
    """Warnings about checkpoints whose folders were renamed: the run does not use them."""
    lines = []
    with files_at(folder):
        paths = sorted(checkpoints_of(folder).glob("*"))
    for path in (path for path in paths if not path.name.endswith(PART) and not key_of(path.name)):
        try:  # without retries: nobody needs it, and it may have been moved here because it is unreadable
            manifest = sealed.parse_manifest(sealed.read_text(path / sealed.MANIFEST))
            name = checkpoint_name(manifest["step"], len(manifest["forks"]))
            lines.append(f"{printable(str(path))} is not used, because its name is not {name}")
        except (Damaged, NoFile, OSError, KeyError, TypeError, ValueError):
            continue
    return lines


def none_is_whole(folder: Path, damaged: list[tuple[Path, str]]) -> UserError:
    """The error, which is not raised here. It names three faults."""
    faults = "; ".join(f"{path.name}: {fault}" for path, fault in damaged[:3])
    return UserError(
        f"{checkpoints_of(folder)} must hold a whole checkpoint, but none of {len(damaged)} is ({faults}); copy one back, or "
        "move them away to start again"
    )


def skipped(path: Path | str, fault: str) -> str:
    return f"checkpoint {path} is damaged and skipped: {fault}"


def clear_unfinished(folder: Path) -> None:
    """Remove what earlier processes left half-written. First give a checkpoint that was being replaced its name back."""
    with files_at(folder):
        durable.put_back(checkpoints_of(folder))
        for part in checkpoints_of(folder).glob(f"*{PART}"):
            beneath.discard(part)


def kept(whole: dict[str, dict], settings) -> set[str]:
    """The names of the whole checkpoints (manifest by name) to keep. From the history of the newest one these are the last
    `keep`, one every `keep_every` steps, and the best. A checkpoint from which the run went back is not in this history."""
    names = history(whole)
    steps = {name: key_of(name)[1] for name in names}
    stays = set(names[: settings.keep])
    stays |= {name for name in names if settings.keep_every and steps[name] % settings.keep_every == 0}
    return stays | ({best} if (best := best_of(whole, settings)) else set())


def best_of(whole: dict[str, dict], settings) -> str | None:
    """The name of the best checkpoint in the history of the newest one; of equals the earliest. None if none was measured, or if
    the run file does not say which number decides."""
    sign = 1 if settings.lowest_is_best else -1
    numbers = {name: number_of(whole[name], settings.judged_by) for name in history(whole)}
    measured = {name: sign * number for name, number in numbers.items() if number is not None and math.isfinite(number)}
    return min(measured, key=lambda name: (measured[name], key_of(name)[1]), default=None)


def number_of(manifest: dict, name: str) -> float | None:
    """The number that was measured at the checkpoint's own step."""
    usual = manifest.get("validation") if name == "val/loss" else None  # earlier versions wrote it here
    return manifest.get("scores", {}).get(name, usual)


def prune(folder: Path, settings, spared: Set[str] = frozenset()) -> None:
    """Remove the whole checkpoints that need not be kept. `ted-scale checkpoints` removes damaged ones. Note: if one cannot be
    read, it is unknown which ones to keep, and `published` raises Gone."""
    whole = {c.path.name: c.manifest for c in published(folder) if c.fault is None}
    for name in whole.keys() - kept(whole, settings) - spared:
        durable.remove(checkpoints_of(folder) / name)
