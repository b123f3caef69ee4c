"""Which pairs and tokens stage I reads in a step, if it does not read all of them: a pure function of seed and step.

Pairs are drawn for each step. Positions in the sequence are drawn for each step and pair, and are the same in every sequence. So
the draw does not depend on ranks, micro-batches or accumulation. A rank that has a part of every row reads the positions drawn in
its part. Every token has the same chance, so the estimates are unbiased.
"""

import torch

from ted_scale.config.method import Filters
from ted_scale.data.order import mix
from ted_scale.data.packing import Share


def drawn_pairs(filters: Filters, count: int, seed: int) -> list[int]:
    if filters.sample_pairs is None or filters.sample_pairs >= count:
        return list(range(count))
    return sorted(permutation(count, mix(seed, 0))[: filters.sample_pairs].tolist())


def drawn_rows(
    filters: Filters, pairs: list[int], pair: int, seed: int, batch: int, length: int, device, share: Share | None = None,
):  # fmt: skip
    """The rows of [batch × length] tokens that `pair` reads. None means all of them. A pair that is not drawn gets an empty
    tensor. With `share`, the tokens are that part of longer rows."""
    if pair not in pairs:
        return torch.empty(0, dtype=torch.int64, device=device)
    if filters.sample_tokens == 1.0:
        return None
    whole = length * share.of if share else length
    positions = permutation(whole, mix(seed, 1 + pair))[: kept_of(filters, whole)].sort().values
    if share:
        positions = positions[positions // length == share.index] % length
    rows = torch.arange(batch)[:, None] * length + positions[None, :]
    return rows.flatten().to(device, non_blocking=True)


def kept_of(filters: Filters, length: int) -> int:
    """How many positions of a row are read."""
    return max(1, round(length * float(filters.sample_tokens)))


def times_of(filters: Filters, length: int, share: Share | None = None) -> float:
    """The factor by which a drawn row counts, so that the sum is that of all rows on average."""
    whole = length * share.of if share else length
    return whole / kept_of(filters, whole)


def permutation(count: int, seed: int):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
