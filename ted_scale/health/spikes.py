"""Is a step's loss a spike? How often did the run drop an update or go back? Pure functions of values that a checkpoint holds.

guard.py reads the numbers. bad_step.py reports their rank and tensor. rewind.py goes back. This file compares floats that are
equal on all ranks, so all ranks decide the same without a message. Note: the losses with which a spike is compared are in the
checkpoint, so a resumed run decides as an uninterrupted one does.
"""

import hashlib
import json
import statistics
from dataclasses import replace

from ted_scale.checkpoints.progress import Health, Progress
from ted_scale.config import operation
from ted_scale.distill.signal import Weights


def state_of(progress: Progress) -> Health:
    return progress.health or Health()


def begin(progress: Progress, stage, each: list[Weights]) -> Progress:
    """Call it before a step with these loss weights. If the stage, the loss terms or the data have changed, the median starts
    again, because the losses cannot be compared. A term that is switched on within a stage is such a change."""
    state, ground = state_of(progress), ground_of(stage, each)
    if state.ground != ground:
        state = replace(state, ground=ground, losses=(), in_a_row=0)
    return replace(progress, health=state)


def ground_of(stage, each: list[Weights]) -> str:
    """A digest of all settings that change the watched loss of a step."""
    data = stage.run.data
    corpora = [(corpus.name, corpus.weight) for corpus in data.corpora]
    made_of = [stage.name, stage.run.loss.model_dump(), data.seq_len, data.attention, corpora, stage.asks_every]
    made_of.append([any(weights[term] > 0 for weights in each) for term in range(3)])  # ce, kl, layer
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def spiked_over(state: Health, settings: operation.Health, loss: float) -> float | None:
    """The median, if `loss` is too far above it and the loss of the step before was not. None otherwise."""
    if settings.on_spike == "off" or len(state.losses) < settings.spike_window // 4:
        return None
    median = statistics.median(state.losses)
    limit = settings.spike_factor * median
    return median if loss > limit >= state.losses[-1] else None


def taken(progress: Progress, settings: operation.Health, loss: float) -> Progress:
    """The progress after a step that updated the weights."""
    state = state_of(progress)
    rewinds = 0 if progress.step > state.rewound_from else state.rewinds
    losses = [*state.losses, loss][-settings.spike_window :]
    return replace(progress, health=replace(state, in_a_row=0, rewinds=rewinds, losses=losses))


def dropped(progress: Progress) -> Progress:
    """The progress after a step whose update was dropped."""
    state = state_of(progress)
    state = replace(state, in_a_row=state.in_a_row + 1)
    return replace(progress, skipped=progress.skipped + 1, health=state)
