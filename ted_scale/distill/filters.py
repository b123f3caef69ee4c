"""The task-aware filters that sit on matched blocks.

A filter is a linear map with bias into the common width D, optionally behind a residual MLP; where they start,
principal.py says. Where D is narrower than what stage I's head reads, the teacher's filter of a pair owns a map back,
its lift, that both sides of the pair share: so both narrow spaces are one. A filter's forward lends its weights to the
loss that is passed in: fused losses read weights as tensors, and under ZeRO-3 a weight is whole only while its owner's
forward runs.
"""

import torch
from torch import nn

from ted_scale.config.run import Run
from ted_scale.models.anatomy import Anatomy, Head


def has_lift(run: Run, teacher: Anatomy) -> bool:
    """Whether stage I reads a narrow state through a map back to the teacher's width."""
    return run.filters.head != "per_layer" and run.filters.width < teacher.width


class Silent(nn.Linear):
    """A linear map that starts at 0. ZeRO-3 shards its weights as soon as they are made, so that it must be born so."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Filter(nn.Module):
    """[N, E] → [N, D]; for stage I alone, `vocab` adds a head of the filter's own (head = "per_layer"), and `lift` a map
    from D to that width."""

    def __init__(
        self, width_in: int, width_out: int, *, mlp: int = 0, random: bool = False, vocab: int = 0, lift: int = 0,
        seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out))
        self.up = nn.Linear(width_in, mlp) if mlp else None
        self.down = Silent(mlp, width_in) if mlp else None
        self.lift_weight = nn.Parameter(torch.empty(lift, width_out)) if lift else None
        self.head_weight = nn.Parameter(torch.empty(vocab, width_out)) if vocab else None
        self.head_bias = nn.Parameter(torch.zeros(vocab)) if vocab else None
        with torch.no_grad():
            self.start(random or width_in != width_out)

    def start(self, random: bool) -> None:
        """Written inside the constructor, while ZeRO-3 still lets every rank see the whole tensor."""
        if random:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        else:
            nn.init.eye_(self.weight)
        if self.head_weight is not None:
            nn.init.normal_(self.head_weight, std=0.02)
        if self.lift_weight is not None:
            nn.init.normal_(self.lift_weight, std=self.weight.shape[0] ** -0.5)

    def bend(self, states_NE):
        """The residual MLP."""
        if self.up is None:
            return states_NE
        return states_NE + self.down(torch.nn.functional.gelu(self.up(states_NE)))

    def forward(self, states_NE, loss):
        """`loss(states, weight, bias, own_head, lift)` while the weights are whole."""
        head = None if self.head_weight is None else Head((), self.head_weight, self.head_bias, None, 1.0)
        return loss(self.bend(states_NE), self.weight, self.bias, head, self.lift_weight)


class OutputHead(nn.Module):
    """Owns the network's (maybe tied) output projection once more, to lend it to the fused logit losses."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, states_ND, loss):
        return loss(states_ND, self.weight, self.bias)
