"""Where a run's time went, over all its starts, and what the last start did until it ended: life.json in the run's folder.

Each second since the run first began belongs to one part of Spent, so the parts add up to the whole. A checkpoint keeps Spent,
too: of its step's moment. Note: a killed process writes no last words; its life.json is at most EVERY_S old.
"""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ted_scale.base import beneath, exits
from ted_scale.base.durable import PART
from ted_scale.base.errors import clean, shortened
from ted_scale.base.paths import NoFile, open_file
from ted_scale.config.types import Count

NAME, LONGEST, EVERY_S = "life.json", 2**16, 10.0
STRICT = ConfigDict(strict=True, extra="ignore")
Time = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


@dataclass(frozen=True)
class Spent:
    """Seconds by what they went to, until `at`, which is in seconds since 1970."""

    __pydantic_config__ = STRICT

    at: Time = 0.0
    steps: Time = 0.0  # that count: in the newest checkpoint, or taken since
    start: Time = 0.0  # from the start of a process to its first step, and between stages
    validation: Time = 0.0
    checkpoints: Time = 0.0  # while a step waited for a save
    repeated: Time = 0.0  # steps that were lost with a process, or undone by going back
    down: Time = 0.0  # from the end of a process to the start of the next one
    samples: Time = 0.0  # of text, that student and teacher write

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


PARTS = ("steps", "start", "validation", "checkpoints", "repeated", "down", "samples")


KILLED = "it was killed, or its machine is gone"
DONE = "it was done"  # the last words of a run that has taken all of its steps


@dataclass(frozen=True)
class Life:
    """The last sign of life: the step, the time spent by then, and the last words, if the process could write them."""

    __pydantic_config__ = STRICT

    step: Count
    spent: Spent
    words: str = ""


@dataclass(frozen=True)
class Lost:
    """What the end of the last process cost."""

    steps: int
    seconds: float  # in these steps
    down: float  # seconds until the next process
    words: str

    def sentence(self, step: int) -> str:
        took = f"{self.steps:,} steps after step {step:,} ({self.seconds / 60:.1f} min)" if self.steps else "no step"
        if self.words == KILLED:  # what it took since it last wrote life.json is not known
            took = f"at least {took}" if self.steps else f"what it took in its last {EVERY_S:.0f} s"
        return f"the run was down for {self.down / 60:.1f} min, and {took} must be taken again; its end: {self.words}"

    def row(self) -> dict[str, float]:
        numbers = {"lost_steps": self.steps, "lost_min": self.seconds / 60, "down_min": self.down / 60}
        return {f"perf/restart_{key}": number for key, number in numbers.items()}


def take_up(folder: Path, step: int, saved: Spent | None) -> tuple[Spent, Lost | None]:
    """(the time spent until this process began, what was lost), for a run that goes on from `step`. The next start shall know
    it, even if this one fails before it takes a step."""
    last, began = read(folder), psutil.Process().create_time()
    spent, lost = add_up(step, saved, last, began)
    write(folder, Life(step, spent))
    exits.at_end = lambda words: write(folder, Life(step, spent, ending(words)))  # until metrics.py counts the time
    return spent, lost


def add_up(step: int, saved: Spent | None, last: Life | None, began: float) -> tuple[Spent, Lost | None]:
    """What a start at `step` finds spent, by its checkpoint (`saved`) and by the life before it, and what that life lost."""
    if last is None and saved is None:  # the first start, or the first that counts
        return Spent(at=began), None
    if last and last.words == DONE and last.step == step:  # nothing was lost, and nobody waited for the run
        return dataclasses.replace(last.spent, at=max(began, last.spent.at)), None
    saved = saved or Spent()
    if last is None or last.spent.total < saved.total:  # the folder was lost, and a copy of the checkpoint was not
        last = Life(step, saved)
    lost, began = max(0.0, last.spent.steps - saved.steps), max(began, last.spent.at)
    down, words = began - last.spent.at, last.words or KILLED
    before = last.spent
    spent = dataclasses.replace(
        before, at=began, steps=before.steps - lost, repeated=before.repeated + lost, down=before.down + down
    )
    return spent, Lost(max(0, last.step - step), lost, down, words)


def ending(words: str) -> str:
    """The last line of an exit's words: a traceback ends with its error."""
    return shortened(clean((words.strip().splitlines() or [""])[-1]), 500)


def write(folder: Path, life: Life) -> None:
    """A full disk loses it, and never stops a run. It is not synced, because that takes time."""
    path = folder / NAME
    part = path.with_name(path.name + PART)
    with contextlib.suppress(OSError):
        with os.fdopen(beneath.make_new(part), "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(life), file)
        beneath.rename(part, path)


def read(folder: Path) -> Life | None:
    """None if there is none, or if it cannot be read: nothing but a report depends on it."""
    with (
        contextlib.suppress(NoFile, OSError, ValueError, ValidationError),
        os.fdopen(open_file(folder / NAME), "rb") as file,
    ):
        life = READER.validate_json(file.read(LONGEST))
        return dataclasses.replace(life, words=ending(life.words))
    return None


READER = TypeAdapter(Life)
