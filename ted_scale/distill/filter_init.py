"""Initial weights of filters, from one pass over a little training text; the same on any number of ranks.

A teacher's filter starts as the principal directions of its block's states (or as the identity if it is as wide). Its lift starts
as the transpose. A student's filter starts as the ridge regression of the teacher's filtered states on the student's. Every state
is divided by its norm first, because norm layers and the layer loss depend on the direction alone. Without this, a few sink
tokens, whose norms are a hundred times as large, would determine the first directions.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.kernels.products import live_rows
from ted_scale.kernels.tokens import valid_weights

TOKENS_A_WIDTH = 8  # tokens of the pass for each dimension of the wider model: enough for a regression on all of them
RIDGE = 1e-3  # times the mean eigenvalue


class Moments(NamedTuple):
    """Sums over the tokens of a pair, of states t and s divided by ‖t‖: Σ t·tᵀ and, if the student ran, Σ t·sᵀ and Σ s·sᵀ."""

    tt: torch.Tensor
    ts: torch.Tensor | None = None
    ss: torch.Tensor | None = None


class Start(NamedTuple):
    """Weights of a pair's filters; None keeps those of the constructor."""

    teacher: torch.Tensor | None
    student: torch.Tensor | None


@torch.no_grad()
def add_moments(sums: list[Moments] | None, batch, states_t, states_s) -> list[Moments]:
    """`sums` plus the sums of a micro-batch. Each pair has one tensor [N, width] of states. states_s is empty if no student ran."""
    weight = valid_weights(batch.labels_BT.flatten(), batch.weights_BT.flatten())
    found = []
    for k, t in enumerate(states_t):
        t = live_rows(t.float(), weight)
        t, length = torch.nn.functional.normalize(t), t.norm(dim=1, keepdim=True).clamp(min=1e-12)
        s = live_rows(states_s[k].float(), weight) / length if states_s else None
        found.append(Moments(t.t() @ t) if s is None else Moments(t.t() @ t, t.t() @ s, s.t() @ s))
    if sums is None:
        return found
    return [
        Moments(*(a if b is None else a.add_(b) for a, b in zip(old, new, strict=True)))
        for old, new in zip(sums, found, strict=True)
    ]


def over_ranks(sums: list[Moments]) -> None:
    """Adds the sums over all ranks. Those of pair k go to the rank that computes its filters."""
    for k, pair in enumerate(sums):
        for tensor in pair:
            if tensor is not None:
                dist.reduce(tensor, dst=k % dist.get_world_size())


def directions(tt: torch.Tensor, width: int) -> torch.Tensor:
    """[width, d] orthonormal rows: the eigenvectors of the largest eigenvalues of Σ t·tᵀ. The sign of an eigenvector is
    arbitrary, so each gets a positive largest entry."""
    vectors = torch.linalg.eigh(tt.double()).eigenvectors.flip(1)[:, :width]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).t().float().contiguous()


def regression(filter_t: torch.Tensor | None, pair: Moments) -> torch.Tensor:
    """The W [width, d_s] that minimizes Σ ‖W·s − filter_t·t‖²/‖t‖²; a filter of None is the identity."""
    ts, ss = pair.ts.double(), pair.ss.double()
    damped = ss + (RIDGE * ss.trace() / len(ss) + 1e-30) * torch.eye(len(ss), dtype=ss.dtype, device=ss.device)
    target = ts if filter_t is None else filter_t.double() @ ts
    return torch.linalg.solve(damped, target.t()).t().float()


def start_of(pair: Moments, width: int) -> Start:
    teacher = directions(pair.tt, width) if width < len(pair.tt) else None
    return Start(teacher, None if pair.ts is None else regression(teacher, pair))
