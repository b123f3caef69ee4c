"""The values that teacher, student and training loop exchange in a micro-batch."""

from typing import NamedTuple

import torch


class Signal(NamedTuple):
    """The teacher's output for one micro-batch: the states of the matched blocks, one a pair, and the head's input."""

    layers_NE: tuple
    last_NE: torch.Tensor


class Weights(NamedTuple):
    """The weights of a step's loss terms."""

    ce: float
    kl: float
    layer: float
    sample_seed: int = 0  # stage I: which pairs and tokens the step reads
    asked: float = 1.0  # the share of the step's micro-batches that the teacher sees
    floor: float = 0.0  # with loss.skip_low_entropy: a token whose teacher has a lower entropy has no KL


class Losses(NamedTuple):
    """This rank's share of the step's means; only `total` has a gradient. `layers` has one value a pair (stage I: the
    teacher's filters, then the student's). `tally` is that of entropies.py, with loss.skip_low_entropy."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    layer: torch.Tensor
    layers: torch.Tensor
    tally: torch.Tensor | None = None
