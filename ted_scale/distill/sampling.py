"""Which (layer, token) pairs stage I reads in a step where it is told to read a part: a pure function of seed and step.

Pairs are drawn for the step; positions inside the sequence for each step and pair, the same in every sequence. So the
draw knows nothing of ranks, micro-batches or accumulation, and every token has the same chance: estimates are unbiased.
"""

import torch

from ted_scale.config.method import Filters
from ted_scale.data.order import mix


def drawn_pairs(filters: Filters, count: int, draw: int) -> list[int]:
    if filters.sample_pairs is None or filters.sample_pairs >= count:
        return list(range(count))
    return sorted(permutation(count, mix(draw, 0))[: filters.sample_pairs].tolist())


def drawn_rows(filters: Filters, pairs: list[int], pair: int, draw: int, batch: int, length: int, device):
    """Row numbers of [batch × length] tokens that `pair` reads, None for all of them; none at all if it is not drawn."""
    if pair not in pairs:
        return torch.empty(0, dtype=torch.int64, device=device)
    if filters.sample_tokens == 1.0:
        return None
    kept = max(1, round(length * float(filters.sample_tokens)))
    positions = permutation(length, mix(draw, 1 + pair))[:kept].sort().values
    rows = torch.arange(batch)[:, None] * length + positions[None, :]
    return rows.flatten().to(device, non_blocking=True)


def permutation(count: int, seed: int):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
