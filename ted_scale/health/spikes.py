"""Whether a step's loss is a spike, and how often a run dropped an update or went back, as pure functions of what stands in a
checkpoint.

guard.py reads the numbers, bad_step.py says whose they were, rewind.py goes back; this file counts and compares floats that are
the same on every rank, so that all come to the same end without asking each other. The surprise: what a spike is judged by
is in the checkpoint, so that a resumed run judges as a straight one does.
"""

import hashlib
import json
import statistics
from dataclasses import replace

from ted_scale.checkpoints.progress import Health, Progress
from ted_scale.config import operation


def state_of(progress: Progress) -> Health:
    return progress.health or Health()


def begin(progress: Progress, stage) -> Progress:
    """Another stage, other terms or other data have other losses: their median begins anew."""
    state, ground = state_of(progress), ground_of(stage)
    if state.ground != ground:
        state = replace(state, ground=ground, losses=(), in_a_row=0)
    return replace(progress, health=state)


def ground_of(stage) -> str:
    """A digest of what a stage's loss/total is made of."""
    data = stage.run.data
    corpora = [(corpus.name, corpus.weight) for corpus in data.corpora]
    made_of = [stage.name, stage.run.loss.model_dump(), data.seq_len, data.attention, corpora]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def spiked_over(state: Health, settings: operation.Health, loss: float) -> float | None:
    """The median that `loss` is too far above; None where it is not, or where the step before it was already."""
    if settings.on_spike == "off" or len(state.losses) < settings.spike_window // 4:
        return None
    median = statistics.median(state.losses)
    limit = settings.spike_factor * median
    return median if loss > limit >= state.losses[-1] else None


def taken(progress: Progress, settings: operation.Health, loss: float) -> Progress:
    """After a step that updated the weights."""
    state = state_of(progress)
    rewinds = 0 if progress.step > state.rewound_from else state.rewinds
    losses = [*state.losses, loss][-settings.spike_window :]
    return replace(progress, health=replace(state, in_a_row=0, rewinds=rewinds, losses=losses))


def dropped(progress: Progress) -> Progress:
    """After a step whose update was dropped."""
    state = state_of(progress)
    state = replace(state, in_a_row=state.in_a_row + 1)
    return replace(progress, skipped=progress.skipped + 1, health=state)
