"""Back to an earlier checkpoint after a loss spike: weights, moments, step and schedule are the checkpoint's, samples and blend
go on where they stand, so that the text which the run stumbled over is not read again.

run.py carries it out. The surprise: nothing is written when a run goes back. One that is
killed before its next save resumes from the same checkpoint, meets the same spike, and goes back the same way.
"""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import Progress
from ted_scale.health.spikes import state_of


class Rewind(Exception):
    """All ranks leave the loop at the same step: `progress` is where the run stood behind the spike, `checkpoints` where it
    may go back to, the first that is whole to the last byte."""

    def __init__(self, checkpoints: list[Path], progress: Progress):
        super().__init__(f"back to {checkpoints[0]}")
        self.checkpoints, self.progress = checkpoints, progress


def ways_back(folder: Path, first_step: int, rewinds: int) -> list[Path]:
    """The newest whole checkpoint of a stage and those before it; after every rewind that did not help, without the newest
    of them. Rank 0 looks."""
    found: list = [None]
    if dist.get_rank() == 0:
        whole = {s.path.name: s.manifest for s in files.published(folder) if s.fault is None}
        found = [choose(files.history(whole), first_step, rewinds)]
    dist.broadcast_object_list(found, src=0)
    return [files.checkpoints_of(folder) / name for name in found[0]]


def choose(history: list[str], first_step: int, rewinds: int) -> list[str]:
    """`history` is newest first; the oldest of the stage is always left."""
    of_stage = [name for name in history if files.key_of(name)[1] > first_step]
    return of_stage[min(rewinds, len(of_stage) - 1) :] if of_stage else []


def gone_back(before: Progress, now: Progress) -> Progress:
    """Where a run goes on whose weights are those of `before`, and which has read what `now` says."""
    past, state = state_of(before), state_of(now)
    past = past._replace(rewinds=state.rewinds + 1, rewound_from=max(state.rewound_from, now.step))
    adaptive = now.adaptive and {**now.adaptive, "step": before.step}  # the next border measures these weights again
    forks = (*now.forks, before.step)
    return replace(now, step=before.step, tokens=before.tokens, adaptive=adaptive, health=past._asdict(), forks=forks)
