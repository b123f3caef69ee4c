"""Going back to an earlier checkpoint after a loss spike. Weights, moments, step and schedule are those of the checkpoint.
Samples and blend continue, so that the run does not read the same text again.

run.py carries it out. Note: going back writes nothing. A run that is killed before its next save resumes from the same
checkpoint, meets the same spike, and goes back in the same way.
"""

from dataclasses import replace
from pathlib import Path

from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import Progress
from ted_scale.health.spikes import state_of
from ted_scale.ranks.agree import of_rank_0


class Rewind(Exception):
    """Raised on all ranks after the same step. `progress` is the progress after the spike. `checkpoints` are candidates, newest
    first. The run goes back to the first one whose bytes are all intact."""

    def __init__(self, checkpoints: list[Path], progress: Progress):
        super().__init__(f"back to {checkpoints[0]}")
        self.checkpoints, self.progress = checkpoints, progress


def ways_back(folder: Path, first_step: int, rewinds: int) -> list[Path]:
    """The whole checkpoints of this stage, newest first. For each earlier rewind that did not help, one more of the newest is
    left out. No file is deleted."""
    whole = of_rank_0(lambda: {c.path.name: c.manifest for c in files.published(folder) if c.fault is None})
    return [files.checkpoints_of(folder) / name for name in choose(files.history(whole), first_step, rewinds)]


def choose(history: list[str], first_step: int, rewinds: int) -> list[str]:
    """The candidates of a `history` that is newest first. The oldest checkpoint of the stage is always among them."""
    of_stage = [name for name in history if files.key_of(name)[1] > first_step]
    return of_stage[min(rewinds, len(of_stage) - 1) :] if of_stage else []


def gone_back(before: Progress, now: Progress) -> Progress:
    """The progress of a run that has the weights of `before` but has read the text of `now`."""
    past, state = state_of(before), state_of(now)
    past = replace(past, rewinds=state.rewinds + 1, rewound_from=max(state.rewound_from, now.step))
    adaptive = now.adaptive and {**now.adaptive, "step": before.step}  # the next border measures its weights again
    forks = (*now.forks, before.step)
    of_weights = {name: getattr(before, name) for name in ("step", "tokens", "balance", "spent")}
    return replace(now, **of_weights, adaptive=adaptive, health=past, forks=forks)
