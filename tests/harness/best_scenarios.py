"""Scenario of ranks.py: the best checkpoint of a run that is ended between a validation and its save, in three ways."""

from pathlib import Path

import torch.distributed as dist
from scenarios import TWO, rows, start
from tiny import make_run

from ted_scale import run
from ted_scale import validate as validation
from ted_scale.base.errors import Preempted, RunStopped
from ted_scale.checkpoints import folder as files

# The loss falls, so that the highest one is not that of the newest checkpoint.
SECTIONS = {
    "method": "ce", "train": {"steps": 8, "lr": 1e-2, **TWO}, "validation": {"every": 2, "tokens": 512},
    "checkpoint": {"every": 2, "keep": 1, "best": "val/loss", "best_is": "highest"},
}  # fmt: skip


def best_is_kept(folder: Path, device):
    """What each of both runs kept, what it takes for best, and how the starts of the second one ended."""
    straight = kept_by(folder, device, "best_straight")
    measured = {
        row["step"]: row["val/loss"] for row in rows(folder, "best_straight") if row["step"] and "val/loss" in row
    }
    at, ends = max(measured, key=measured.get), []
    for fault in (killed_before(at), stopped_in(at), killed_before(at)):
        undo = fault()
        try:
            start(folder, device, name="best_ended", **SECTIONS)
        except (Preempted, RunStopped) as error:
            ends.append(type(error).__name__)
        finally:
            undo()
        dist.barrier()
    return {"at": at, "ends": ends, "straight": straight, "ended": kept_by(folder, device, "best_ended")}


def kept_by(folder: Path, device, name: str) -> list:
    """[steps of its checkpoints, step of the best one] of a run that is trained to its end."""
    start(folder, device, name=name, **SECTIONS)
    settings = make_run(folder, **SECTIONS).checkpoint
    dist.barrier()
    whole = {c.path.name: c.manifest for c in files.published(folder / "runs" / name)}
    best = files.best_of(whole, settings)
    return [sorted(files.key_of(one)[1] for one in whole), best and files.key_of(best)[1]]


def killed_before(step: int):
    """Before the save of this step."""
    original = run.save_checkpoint

    def save(*arguments):
        if arguments[-1].step == step:
            raise RunStopped("killed")
        original(*arguments)

    def put():
        run.save_checkpoint = save
        return lambda: setattr(run, "save_checkpoint", original)

    return put


def stopped_in(step: int):
    """By a signal in the validation of this step."""
    original = validation.validate

    def validate(*arguments, **named):
        return (arguments[-1], True) if arguments[-1].step == step else original(*arguments, **named)

    def put():
        validation.validate = validate
        return lambda: setattr(validation, "validate", original)

    return put
