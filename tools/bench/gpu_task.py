"""One part of tools/bench/gpu.py in its own process: its arguments, and the row with its outcome."""

import importlib
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ted_scale.base.errors import UserError
from tools.bench import gpu_report
from tools.bench.gpu_report import PART, Row


class Skipped(Exception):
    """This machine cannot do it; the reason."""


class Late(Exception):
    """A part of it is done; a second call continues."""


ENDS = {Skipped: "skipped", Late: "late"}


@dataclass(frozen=True, kw_only=True)
class Task:
    part: str
    out: Path
    work: Path  # for models and corpora, no results
    limit: float  # seconds until the process is killed
    tiny: bool
    commit: str
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.began)

    @property
    def rows(self) -> Path:
        return self.out / "rows.csv"

    @property
    def as_column(self) -> str:
        return "tiny" if self.tiny else ""

    def device(self) -> str:
        """`cpu` in a rehearsal, whatever the machine has."""
        import torch

        if self.tiny:
            return "cpu"
        if not torch.cuda.is_available():
            raise Skipped("torch sees no CUDA device; --tiny rehearses on a CPU")
        return "cuda"


def run(task: Task, module: str, function: str, settings: dict) -> None:
    """Run it and write its rows at once; the row about the part is the last."""
    facts = surroundings(task)
    write = partial(write_row, task, facts)
    try:
        getattr(importlib.import_module(f"tools.bench.{module}"), function)(task, write, **settings)
        end = {}
    except Exception as error:
        traceback.print_exc()
        words = str(error) if isinstance(error, (*ENDS, UserError)) else f"{type(error).__name__}: {error}"
        end = {"status": ENDS.get(type(error), "failed"), "reason": words}
    write(PART, time.monotonic() - task.began, "s", **end)


def write_row(task: Task, facts: dict, figure: str, value=None, unit: str = "", **more) -> None:
    row = Row(task.part, figure, value=value, unit=unit, **more)
    print(f"{row.figure} {row.arm} {row.value} {row.unit} {row.status} {row.reason}", flush=True)
    gpu_report.append(task.rows, [row], facts)


def surroundings(task: Task) -> dict:
    import torch

    from tools.bench import loss_report

    device = "cuda" if torch.cuda.is_available() and not task.tiny else "cpu"
    known = loss_report.surroundings()
    known |= {name: loss_report.version(name) for name in ("deepspeed", "transformers")}
    known |= {"hardware": loss_report.hardware(device), "commit": task.commit or known["commit"]}
    return {name: known[name] for name in gpu_report.FACTS} | {"tiny": task.as_column}
