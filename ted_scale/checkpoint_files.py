"""A run's checkpoints as files: names, what stands in them beside DeepSpeed's shards, which one is the newest.

Needs no process group and no DeepSpeed, so that a wrong resume is refused before either starts. `latest` is moved by
one rename after everything it names is on disk.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ted_scale.errors import UserError

PART = ".part"
HARMLESS = ("data.seq_len", "data.attention", "train.tokens_per_step")  # the data goes on with others, see blend.py


@dataclass(frozen=True)
class Progress:
    """Where a run stands. With the shards beside it, all that a resume needs: the schedule follows from it."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # of this stage's data
    blend: dict | None = None  # blend.as_dict
    adaptive: dict | None = None  # feed.Measured
    skipped: int = 0  # steps whose update was dropped
    health: dict | None = None  # health.State
    wandb_id: str | None = None
    identity: dict = dataclasses.field(default_factory=dict)

    def advanced(self, samples: int, seq_len: int) -> "Progress":
        tokens = self.tokens + samples * seq_len
        return dataclasses.replace(self, step=self.step + 1, tokens=tokens, samples=self.samples + samples)


def checkpoints_of(folder: Path) -> Path:
    return folder / "checkpoints"


def filters_of(folder: Path) -> Path:
    """Stage I's result."""
    return folder / "filters.safetensors"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def newest_checkpoint(folder: Path) -> Path | None:
    pointer = checkpoints_of(folder) / "latest"
    if not pointer.exists():
        return None
    checkpoint = checkpoints_of(folder) / pointer.read_text(encoding="utf-8").strip()
    if not (checkpoint / "progress.json").is_file():
        raise UserError(
            f"{pointer} must name a checkpoint, but {checkpoint} is not one; write the name of a whole one into it"
        )
    return checkpoint


def checkpoints_up_to_newest(folder: Path) -> list[Path]:
    """The oldest first; what an earlier life of the run left past the newest is no part of it."""
    newest = newest_checkpoint(folder)
    found = sorted(p for p in checkpoints_of(folder).glob("step_*") if (p / "progress.json").is_file())
    return [p for p in found if newest and p.name <= newest.name and not p.name.endswith(PART)]


def read_progress(checkpoint: Path) -> Progress:
    try:
        values = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        if missing := {field.name for field in dataclasses.fields(Progress)} - values.keys():
            raise ValueError(f"it has no {min(missing)}")
        return Progress(**values)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint}/progress.json must be a progress file, but is not: {error}") from None


def write_durably(path: Path, text: str) -> None:
    """Whole or not at all, also over a power cut."""
    temporary = path.with_name(path.name + PART)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_progress(checkpoint: Path, progress: Progress) -> None:
    write_durably(checkpoint / "progress.json", json.dumps(dataclasses.asdict(progress), indent=1))


def publish(part: Path) -> Path:
    """Give a finished checkpoint its name, then move `latest` to it."""
    checkpoint = part.with_name(part.name.removesuffix(PART))
    shutil.rmtree(checkpoint, ignore_errors=True)  # of an earlier life of this run, past where it was resumed
    part.rename(checkpoint)
    write_durably(checkpoint.parent / "latest", checkpoint.name)
    return checkpoint


def prune(folder: Path, keep: int) -> None:
    """Only the last `keep` checkpoints up to the newest stay; what an earlier life of the run left past it is not ours."""
    newest = (checkpoints_of(folder) / "latest").read_text(encoding="utf-8")
    found = sorted(p for p in checkpoints_of(folder).glob("step_*") if p.is_dir() and not p.name.endswith(PART))
    steps = [p for p in found if p.name <= newest]
    for old in steps[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_identity(where: Path, theirs: dict, ours: dict) -> None:
    """Refuse the first thing in which a checkpoint and this run differ."""
    for key in differences(theirs, ours):
        if key not in HARMLESS:
            raise UserError(
                f"{key} must be {theirs.get(key)!r} to resume from {where}, but is {ours.get(key)!r}; "
                "set it back, or give the run another name"
            )


def differences(theirs: dict, ours: dict) -> list[str]:
    return [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]


def harmless_changes(theirs: dict, ours: dict, step: int) -> list[str]:
    """What a run must say of a run file that it goes on with, a sentence a change."""
    changed = [key for key in differences(theirs, ours) if key in HARMLESS and key in theirs]
    return [f"{key} is {ours[key]} instead of {theirs[key]} from step {step} on" for key in changed]


def check_filters(path: Path, identity: dict) -> None:
    """`filters.from` names a run whose stage I is done and fits this one."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"filters.from must name a run folder whose stage I is done, but {path} does not exist")
    try:
        with safe_open(path, framework="pt") as tensors:
            written = json.loads(tensors.metadata()["identity"])
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"filters.from must name filters that this project wrote, but {path} is not: {error}") from None
    check_identity(path, written, identity)
