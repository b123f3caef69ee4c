"""Back to an earlier checkpoint after a loss spike: weights, moments, step and schedule are the checkpoint's, samples and blend
go on where they stand, so that the text which the run stumbled over is not read again.

build.py carries it out. The surprise: nothing is written when a run goes back. One that is
killed before its next save resumes from the same checkpoint, meets the same spike, and goes back the same way.
"""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ted_scale import checkpoint_files as files
from ted_scale.checkpoint_files import Progress
from ted_scale.health import state_of


class Rewind(Exception):
    """All ranks leave the loop at the same step: `progress` is where the run stood behind the spike."""

    def __init__(self, checkpoint: Path, progress: Progress):
        super().__init__(f"back to {checkpoint}")
        self.checkpoint, self.progress = checkpoint, progress


def way_back(folder: Path, first_step: int, rewinds: int) -> Path | None:
    """The newest whole checkpoint of a stage; after every rewind that did not help, the one before it. Rank 0 looks."""
    whole = [standing.path for standing in reversed(files.published(folder)) if standing.fault is None]
    found = [choose(whole, first_step, rewinds) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def choose(checkpoints: list[Path], first_step: int, rewinds: int) -> Path | None:
    of_stage = [path for path in checkpoints if path.name > files.checkpoint_name(first_step)]
    return of_stage[max(0, len(of_stage) - 1 - rewinds)] if of_stage else None


def gone_back(before: Progress, now: Progress) -> Progress:
    """Where a run goes on whose weights are those of `before`, and which has read what `now` says."""
    past, state = state_of(before), state_of(now)
    past = past._replace(rewinds=state.rewinds + 1, rewound_from=max(state.rewound_from, now.step))
    adaptive = now.adaptive and {**now.adaptive, "step": before.step}  # the next border measures these weights again
    return replace(now, step=before.step, tokens=before.tokens, adaptive=adaptive, health=past._asdict())
