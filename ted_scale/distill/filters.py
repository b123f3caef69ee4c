"""The task-aware filters that sit on matched blocks.

A filter is a linear map with bias into the common width F, optionally after a residual MLP. filter_init.py computes its initial
weights. If F is narrower than the input of stage I's head, the teacher's filter of a pair owns a lift: a map back to that width.
Both filters of the pair use this lift, so both narrow spaces are the same. A filter's forward calls a loss function with its
weights. Fused losses need the weights as tensors, and under ZeRO-3 a weight is whole only while the forward of its module runs.
"""

import torch
from torch import nn

from ted_scale.config.run import Run
from ted_scale.models.anatomy import Anatomy, Head


def has_lift(run: Run, teacher: Anatomy) -> bool:
    """Whether stage I's head reads a narrow state through a map back to the teacher's width."""
    return run.filters.head != "per_layer" and run.filters.width < teacher.width


def keeps_filtered(plan, stage) -> bool:
    """Whether the teacher's filters read each state when it is computed, so that no state is kept. Filtered states are kept in
    fp32, so that no loss changes. This is done only if they are smaller than the states. In stage I the loss reads the states."""
    if plan.run.method != "ted" or stage.learns_filters:
        return False
    return 4 * plan.width < (2 if plan.run.train.precision == "bf16" else 4) * plan.teacher.width


class ZeroLinear(nn.Linear):
    """A linear map that starts at 0. The constructor must set the zeros: ZeRO-3 shards the weights directly after it."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Filter(nn.Module):
    """[N, E] → [N, F]. In stage I, `vocab` adds an own head (head = "per_layer"), and `lift` adds a map from F to that width."""

    def __init__(
        self, width_in: int, width_out: int, *, mlp: int = 0, random: bool = False, vocab: int = 0, lift: int = 0,
        seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out))
        self.up = nn.Linear(width_in, mlp) if mlp else None
        self.down = ZeroLinear(mlp, width_in) if mlp else None
        self.lift_weight = nn.Parameter(torch.empty(lift, width_out)) if lift else None
        self.head_weight = nn.Parameter(torch.empty(vocab, width_out)) if vocab else None
        self.head_bias = nn.Parameter(torch.zeros(vocab)) if vocab else None
        with torch.no_grad():
            self.initialize(random or width_in != width_out)

    def initialize(self, random: bool) -> None:
        """Runs inside the constructor, where every rank still has whole tensors under ZeRO-3."""
        if random:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        else:
            nn.init.eye_(self.weight)
        if self.head_weight is not None:
            nn.init.normal_(self.head_weight, std=0.02)
        if self.lift_weight is not None:
            nn.init.normal_(self.lift_weight, std=self.weight.shape[0] ** -0.5)

    def residual_mlp(self, states_NE):
        if self.up is None:
            return states_NE
        return states_NE + self.down(torch.nn.functional.gelu(self.up(states_NE)))

    def forward(self, states_NE, loss):
        """Calls `loss(states, weight, bias, own_head, lift)` while the weights are whole."""
        head = None if self.head_weight is None else Head((), self.head_weight, self.head_bias, None, 1.0)
        return loss(self.residual_mlp(states_NE), self.weight, self.bias, head, self.lift_weight)


class OutputHead(nn.Module):
    """A second holder of the network's output projection, which may be tied. Its forward calls the fused logit losses with it."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, states_ND, loss):
        return loss(states_ND, self.weight)
