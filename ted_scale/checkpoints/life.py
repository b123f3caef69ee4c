"""How a run spent its time, over all its starts, and how far the last start came: life.json in the run's folder.

Each second since the run first began belongs to one part of Spent, so the parts add up to the whole. A checkpoint keeps Spent as
it was at its step, too. Note: a killed process writes no last words. Its life.json is at most EVERY_S old.
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
    """Seconds by what they were spent on, until the time `at` (seconds since 1970)."""

    __pydantic_config__ = STRICT

    at: Time = 0.0
    steps: Time = 0.0  # steps that count: those in the newest checkpoint, and those taken since
    start: Time = 0.0  # from the start of a process to its first step, and between stages
    validation: Time = 0.0
    checkpoints: Time = 0.0  # while a step waited for a save
    repeated: Time = 0.0  # steps that were lost with a process, or undone by going back
    down: Time = 0.0  # from the end of a process to the start of the next one
    samples: Time = 0.0  # the text that student and teacher write

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


PARTS = ("steps", "start", "validation", "checkpoints", "repeated", "down", "samples")


KILLED = "it was killed, or its machine is gone"
DONE = "it was done"  # the last words of a run that took all of its steps


@dataclass(frozen=True)
class Life:
    """The last record of a process: the step, the time spent until then, and the last words, if it could write them."""

    __pydantic_config__ = STRICT

    step: Count
    spent: Spent
    words: str = ""


@dataclass(frozen=True)
class Lost:
    """The cost of the end of the last process."""

    steps: int
    seconds: float  # in these steps
    down: float  # seconds until the next process
    words: str

    def sentence(self, step: int) -> str:
        took = f"{self.steps:,} steps after step {step:,} ({self.seconds / 60:.1f} min)" if self.steps else "no step"
        if self.words == KILLED:  # the steps since its last life.json are not known
            took = f"at least {took}" if self.steps else f"what it took in its last {EVERY_S:.0f} s"
        return f"the run was down for {self.down / 60:.1f} min, and {took} must be taken again; its end: {self.words}"

    def row(self) -> dict[str, float]:
        numbers = {"lost_steps": self.steps, "lost_min": self.seconds / 60, "down_min": self.down / 60}
        return {f"perf/restart_{key}": number for key, number in numbers.items()}


def take_up(folder: Path, step: int, saved: Spent | None) -> tuple[Spent, Lost | None]:
    """(the time spent until this process began, what was lost), for a run that continues from `step`. It is written at once, so
    the next start knows it even if this one fails before its first step."""
    last, began = read(folder), psutil.Process().create_time()
    spent, lost = add_up(step, saved, last, began)
    write(folder, Life(step, spent))
    exits.at_end = lambda words: write(folder, Life(step, spent, ending(words)))  # metrics.py replaces this later
    return spent, lost


def add_up(step: int, saved: Spent | None, last: Life | None, began: float) -> tuple[Spent, Lost | None]:
    """(the time spent until a start at `step`, what was lost). `saved` comes from its checkpoint, `last` from the process
    before."""
    if last is None and saved is None:  # the first start, or the first with time records
        return Spent(at=began), None
    if last and last.words == DONE and last.step == step:  # nothing was lost, and nobody waited for the run
        return dataclasses.replace(last.spent, at=max(began, last.spent.at)), None
    saved = saved or Spent()
    if last is None or last.spent.total < saved.total:  # the folder was lost, but a copy of the checkpoint was not
        last = Life(step, saved)
    lost, began = max(0.0, last.spent.steps - saved.steps), max(began, last.spent.at)
    down, words = began - last.spent.at, last.words or KILLED
    before = last.spent
    spent = dataclasses.replace(
        before, at=began, steps=before.steps - lost, repeated=before.repeated + lost, down=before.down + down
    )
    return spent, Lost(max(0, last.step - step), lost, down, words)


def ending(words: str) -> str:
    """The last line of an exit's message. In a traceback this line has the error."""
    return shortened(clean((words.strip().splitlines() or [""])[-1]), 500)


def write(folder: Path, life: Life) -> None:
    """Write life.json. On a full disk it is lost, but the run goes on. It is not synced, because a sync takes time."""
    path = folder / NAME
    part = path.with_name(path.name + PART)
    with contextlib.suppress(OSError):
        with os.fdopen(beneath.make_new(part), "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(life), file)
        beneath.rename(part, path)


def read(folder: Path) -> Life | None:
    """Read life.json. None if there is none, or if it cannot be read: only reports depend on it."""
    with (
        contextlib.suppress(NoFile, OSError, ValueError, ValidationError),
        os.fdopen(open_file(folder / NAME), "rb") as file,
    ):
        life = READER.validate_json(file.read(LONGEST))
        return dataclasses.replace(life, words=ending(life.words))
    return None


READER = TypeAdapter(Life)
