"""A run's checkpoints as files: names, what stands in them beside the ranks' state, which is the newest whole one, and
which stay.

Needs no process group and no DeepSpeed, so that a wrong resume is refused before either starts. No file says which checkpoint
is the newest: the folder does, and each one's manifest (sealed.py) says whether it is whole. The surprise: the newest is not
the one of the highest step. A run that went back, after a loss spike or past a damaged checkpoint, goes on in a line of its
own, whose number is in the name: step_00000007_1 is newer than step_00000008.
"""

import math
import re
import shutil
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from ted_scale.base import sealed
from ted_scale.base.errors import UserError
from ted_scale.base.parsing import is_count
from ted_scale.base.sealed import PART, Damaged

FILTERS = "filters.safetensors"


class Standing(NamedTuple):
    """A published checkpoint, and what is wrong with it as far as sizes tell."""

    path: Path
    manifest: dict | None
    fault: str | None

    @property
    def step(self) -> int:
        return key_of(self.path.name)[1]


def checkpoints_of(folder: Path) -> Path:
    return folder / "checkpoints"


def filters_of(folder: Path) -> Path:
    """Stage I's result."""
    return folder / FILTERS


def checkpoint_name(step: int, line: int = 0) -> str:
    return f"step_{step:08d}" + (f"_{line}" if line else "")


def key_of(name: str) -> tuple[int, int] | None:
    """(line, step) of a checkpoint's name, by which they are ordered; None of another name."""
    found = re.fullmatch(r"step_([0-9]{8,15})(?:_([1-9][0-9]{0,8}))?", name)
    return (int(found[2] or 0), int(found[1])) if found else None


def published(folder: Path) -> list[Standing]:
    """Newest first. Reads manifests and sizes; `check_digests` reads everything."""
    found = (p for p in checkpoints_of(folder).glob("step_*") if p.is_dir() and key_of(p.name))
    return sorted(map(look_at, found), key=lambda standing: key_of(standing.path.name), reverse=True)


def look_at(checkpoint: Path) -> Standing:
    try:
        return Standing(checkpoint, checked(sealed.check(checkpoint), checkpoint.name), None)
    except Damaged as damage:
        return Standing(checkpoint, None, str(damage))


def checked(manifest: dict, name: str) -> dict:
    """It is of a checkpoint, and of the one that has this name."""
    (line, step), forks, loss = key_of(name), manifest.get("forks"), manifest.get("validation")
    lines = isinstance(forks, list) and len(forks) == line and all(map(is_count, forks))
    if not (lines and manifest.get("step") == step and (loss is None or isinstance(loss, float))):
        raise Damaged(f"its {sealed.MANIFEST} is not of {name}")
    return manifest


def history(whole: dict[str, dict]) -> list[str]:
    """Of whole checkpoints, manifest by name, the newest and those that it came from; newest first."""
    names = sorted(whole, key=key_of, reverse=True)
    forks = whole[names[0]]["forks"] if names else []
    return [name for name in names if key_of(name)[1] <= min(forks[key_of(name)[0] :], default=key_of(name)[1])]


def check_digests(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the bytes of a checkpoint's files; of each `share[1]` files the one at `share[0]`."""
    try:
        files = checked(sealed.check(checkpoint), checkpoint.name)["files"]
        for name in list(files)[share[0] :: share[1]]:
            sealed.check_file(checkpoint, name, files[name])
    except Damaged as damage:
        return str(damage)
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest one that is whole. A run whose checkpoints are all damaged must not begin anew in silence."""
    standings = published(folder)
    whole = next((s.path for s in standings if s.fault is None), None)
    if standings and whole is None:
        raise none_is_whole(folder, [(s.path, s.fault) for s in standings])
    return whole


def renamed(folder: Path) -> list[str]:
    """What a user should know of checkpoints under names that are none: nothing looks for them."""
    said = []
    for path in sorted(p for p in checkpoints_of(folder).glob("*") if not p.name.endswith(PART) and not key_of(p.name)):
        try:
            manifest = sealed.read_manifest(path)
            said.append(
                f"{path} is passed over, for its name is not {checkpoint_name(manifest['step'], len(manifest['forks']))}"
            )
        except (Damaged, KeyError, TypeError, ValueError):
            continue
    return said


def none_is_whole(folder: Path, damaged: list[tuple[Path, str]]) -> UserError:
    said = "; ".join(f"{path.name}: {fault}" for path, fault in damaged[:3])
    return UserError(
        f"{checkpoints_of(folder)} must hold a whole checkpoint, but none of {len(damaged)} is ({said}); copy one back, or move "
        "them away to begin anew"
    )


def skipped(path: Path | str, fault: str) -> str:
    return f"checkpoint {path} is damaged and skipped: {fault}"


def clear_unfinished(folder: Path) -> None:
    """What earlier lives of the run left half-way goes, once what was only on its way has its name."""
    sealed.put_back(checkpoints_of(folder))
    for part in checkpoints_of(folder).glob(f"*{PART}"):
        shutil.rmtree(part, ignore_errors=True)


def kept(whole: dict[str, dict], settings) -> set[str]:
    """Of whole checkpoints, manifest by name, those that stay: of the newest one's history the last ones, every so many steps
    for ever, and the best. What a run left to go back from is not in it."""
    names = history(whole)
    steps = {name: key_of(name)[1] for name in names}
    stays = set(names[: settings.keep])
    stays |= {name for name in names if settings.keep_every and steps[name] % settings.keep_every == 0}
    measured = [(whole[name].get("validation"), steps[name], name) for name in names]
    measured = [row for row in measured if row[0] is not None and math.isfinite(row[0])]
    return stays | ({min(measured)[2]} if settings.keep_best and measured else set())


def prune(folder: Path, settings, spared: Set[str] = frozenset()) -> None:
    """Remove what need not stay of the whole ones; damaged ones are for tools/checkpoints.py to remove."""
    whole = {s.path.name: s.manifest for s in published(folder) if s.fault is None}
    for name in whole.keys() - kept(whole, settings) - spared:
        sealed.remove(checkpoints_of(folder) / name)
