"""The values that teacher, student and training loop exchange in a micro-batch."""

from typing import NamedTuple

import torch


class Signal(NamedTuple):
    """The teacher's output for one micro-batch: the states of the matched blocks, one a pair, and the head's input."""

    layers_NE: tuple
    last_NE: torch.Tensor


def parts(signal: Signal, tokens: list[int]) -> list[Signal]:
    """The signals of the micro-batches, of so many tokens each, that one call read."""
    layers = zip(*(states.split(tokens) for states in signal.layers_NE), strict=True) if signal.layers_NE else None
    each = layers or [()] * len(tokens)
    return [Signal(tuple(states), last) for states, last in zip(each, signal.last_NE.split(tokens), strict=True)]


def by_row(states_ND: torch.Tensor, batch, at: int | torch.Tensor | None) -> torch.Tensor:
    """[B, T, D]; of one position, or of one in each row, [B, D], so that the head need not read the others."""
    states_BTD = states_ND.unflatten(0, batch.tokens_BT.shape)
    return states_BTD if at is None else states_BTD[torch.arange(len(states_BTD), device=states_BTD.device), at]


class Weights(NamedTuple):
    """The weights of a step's loss terms."""

    ce: float
    kl: float
    layer: float
    sample_seed: int = 0  # stage I: which pairs and tokens the step reads
    asked: float = 1.0  # the share of the step's micro-batches that the teacher sees
    floor: float = 0.0  # with loss.skip_low_entropy: a token whose teacher has a lower entropy has no KL

    @property
    def asks(self) -> bool:
        """Whether a term needs the teacher."""
        return bool(self.kl or self.layer)


class Losses(NamedTuple):
    """This rank's share of the step's means; only `total` has a gradient. `layers` has one value a pair (stage I: the
    teacher's filters, then the student's). `tally` is that of entropies.py, with loss.skip_low_entropy."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    layer: torch.Tensor
    layers: torch.Tensor
    tally: torch.Tensor | None = None
