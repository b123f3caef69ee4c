"""Which tokens have no KL term: those where the teacher's entropy is lowest (`loss.skip_low_entropy`).

A step's tokens are counted by the teacher's entropy. The bins are the same for every model and every run, and are narrow near 0.
The counts of all ranks give the floor of the next step, so no rank waits for a quantile.
"""

import numpy
import torch

BINS = 128
LARGEST = 16.0  # nats: the entropy of nine million equally likely tokens


def nothing(like: torch.Tensor) -> torch.Tensor:
    """The tally of a micro-batch that the teacher did not read."""
    return like.new_zeros(1 + BINS)


def tally(entropies: torch.Tensor, weights: torch.Tensor, floor: float) -> torch.Tensor:
    """[the number of valid tokens with a KL term, the number of valid tokens in each bin], on the device."""
    valid = (weights > 0).to(torch.float32)
    place = (entropies.nan_to_num() / LARGEST).clamp(0, 1).pow(1 / 3) * BINS
    counts = nothing(entropies)
    counts[1:].scatter_add_(0, place.long().clamp(max=BINS - 1), valid)
    counts[0] = torch.where(entropies >= floor, valid, 0.0).sum()
    return counts


def floor_of(counts: list[float], share: float) -> float | None:
    """The entropy below which `share` of a tally's tokens lie; None if it has no tokens. It is interpolated within a bin. It is
    rounded to fp32, like the entropies that it is compared with."""
    each = numpy.asarray(counts[1:], numpy.float64)
    if not each.sum():
        return None
    sums, edges = numpy.concatenate([[0.0], each.cumsum()]), LARGEST * (numpy.arange(BINS + 1) / BINS) ** 3
    wanted = share * sums[-1]
    k = int(numpy.searchsorted(sums[1:], wanted))
    inside = (wanted - sums[k]) / each[k] if each[k] else 0.0
    return float(numpy.float32(edges[k] + inside * (edges[k + 1] - edges[k])))


def kept_share(counts: list[float]) -> float | None:
    """The share of a tally's tokens that had a KL term."""
    return counts[0] / total if (total := sum(counts[1:])) else None
