"""What teacher, student and loop hand each other in a micro-batch."""

from typing import NamedTuple

import torch


class Signal(NamedTuple):
    """What the teacher says about one micro-batch: the matched blocks' states, one a pair, and the head's input."""

    layers_NE: tuple
    last_NE: torch.Tensor


class Weights(NamedTuple):
    ce: float
    kl: float
    layer: float
    draw: int = 0  # seeds the step's sub-sample of stage I


class Losses(NamedTuple):
    """This rank's share of the step's means; only `total` has a gradient. `layers` is one value a pair (stage I: the
    teacher's filters, then the student's)."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    layer: torch.Tensor
    layers: torch.Tensor
