"""Scenarios of ranks.py: a run that real signals stop, each at another moment, and that goes on each time."""

import os
import signal
from pathlib import Path

import torch.distributed as dist
from scenarios import TWO, start

from ted_scale import feed, run
from ted_scale import validate as validation
from ted_scale.base.errors import Preempted
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import read_progress
from ted_scale.health.guard import Guard
from ted_scale.ranks import signals

# stage II takes steps 3 to 10; it saves at 3, 6, 9 and 10, validates at 2, 4, 6, 8 and 10, weighs its blend at 2 and 7
CORPORA = [{"path": "corpus", "name": name, "validation": 0.1} for name in ("one", "other")]
MOMENTS = {"step": 4, "save": 6, "weigh": 7, "validate": 8, "last": 10}


def settings_of(folder: Path) -> dict:
    corpora = [{**corpus, "path": str(folder / corpus["path"])} for corpus in CORPORA]
    return {
        "filters": {"steps": 2}, "train": {"steps": 8, **TWO}, "checkpoint": {"every": 3, "keep": 100},
        "validation": {"every": 2, "tokens": 256}, "data": {"corpora": corpora, "blend": {"kind": "adaptive", "every": 5}},
    }  # fmt: skip


def stopped_by_signals(folder: Path, device):
    """By moment: whether the run was stopped there, and the newest checkpoint it left; at the end, whether it was done."""
    settings, seen = settings_of(folder), {}
    start(folder, device, name="unsignalled", **settings)
    originals = Guard.gather, run.save_checkpoint, feed.weigh, validation.validate
    signals.listen()
    signals.watched.set()  # by this scenario
    try:
        for moment in [*MOMENTS, "done"]:
            put_signal_into(moment, *originals)
            stopped = False
            try:
                start(folder, device, name="signalled", **settings)
            except Preempted:
                stopped = True
            signals.asked.clear()
            newest = files.newest_checkpoint(folder / "runs" / "signalled")
            seen[moment] = [stopped, read_progress(newest).step]
            dist.barrier()
    finally:
        Guard.gather, run.save_checkpoint, feed.weigh, validation.validate = originals
        signal.set_wakeup_fd(-1)
        for number in signals.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    return seen


def put_signal_into(moment: str, arm, save, weigh, validate) -> None:
    """Rank 1 is told in steps and measurements, rank 0 in a save, and by the other signal."""

    def tell(at: str, step: int, rank: int) -> None:
        if (moment, dist.get_rank(), step) == (at, rank, MOMENTS.get(at)):
            os.kill(os.getpid(), signal.SIGUSR1 if rank == 0 else signal.SIGTERM)
            assert signals.asked.wait(5)

    def armed(self, progress, each):
        tell("step", progress.step + 1, 1)
        tell("last", progress.step + 1, 1)
        arm(self, progress, each)

    def saved(*arguments):
        tell("save", arguments[-1].step, 0)
        save(*arguments)

    def weighed(*arguments):
        tell("weigh", arguments[-1].step, 1)
        return weigh(*arguments)

    def validated(*arguments, **named):
        tell("validate", arguments[-1].step, 1)
        return validate(*arguments, **named)

    Guard.gather, run.save_checkpoint, feed.weigh, validation.validate = armed, saved, weighed, validated
