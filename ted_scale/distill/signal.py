"""The values that teacher, student and training loop exchange in a micro-batch."""

from typing import NamedTuple

import torch


class Signal(NamedTuple):
    """The teacher's output for one micro-batch: the states of the matched blocks, one a pair, and the head's input."""

    layers_NE: tuple
    last_NE: torch.Tensor


def parts(signal: Signal, tokens: list[int]) -> list[Signal]:
    """Split the signal of one call into the signals of its micro-batches, which have `tokens` tokens each."""
    layers = zip(*(states.split(tokens) for states in signal.layers_NE), strict=True) if signal.layers_NE else None
    each = layers or [()] * len(tokens)
    return [Signal(tuple(states), last) for states, last in zip(each, signal.last_NE.split(tokens), strict=True)]


def by_row(states_ND: torch.Tensor, batch, at: int | torch.Tensor | None) -> torch.Tensor:
    """States as [B, T, D]. With `at`, only the states of one position, or of one position in each row, as [B, D]: the head then
    reads no others."""
    states_BTD = states_ND.unflatten(0, batch.tokens_BT.shape)
    return states_BTD if at is None else states_BTD[torch.arange(len(states_BTD), device=states_BTD.device), at]


class Weights(NamedTuple):
    """The weights of a step's loss terms."""

    ce: float
    kl: float
    layer: float
    sample_seed: int = 0  # decides which pairs and tokens a step of stage I reads
    asked: float = 1.0  # the share of the step's micro-batches that the teacher sees
    floor: float = 0.0  # a token with a lower teacher entropy has no KL term (loss.skip_low_entropy)

    @property
    def asks(self) -> bool:
        """Whether a term needs the teacher."""
        return bool(self.kl or self.layer)


class Losses(NamedTuple):
    """This rank's share of the step's means. Only `total` has a gradient. `layers` has one value for each pair (in stage I first
    those of the teacher's filters, then those of the student's). `tally` comes from entropies.py, with loss.skip_low_entropy."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    layer: torch.Tensor
    layers: torch.Tensor
    tally: torch.Tensor | None = None
