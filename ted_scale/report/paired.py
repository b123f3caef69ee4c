"""Paired differences: what the seed does to two arms that start alike and read the same data is not part of them.

Note: the 95 % interval is Student's t, which is wide for a few seeds: 12.7 standard errors for two.
"""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of n - 1 = 1, 2, ... degrees of freedom


class Difference(NamedTuple):
    mean: float
    half: float | None  # of the 95 % interval; None for one seed

    @property
    def verdict(self) -> str:
        if self.half is None:
            return "one seed"
        if abs(self.mean) <= self.half:
            return "noise"
        return "better" if self.mean < 0 else "worse"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours less theirs, over the seeds that both have."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    count, mean = len(differences), statistics.mean(differences)
    half = T95[min(count, 10) - 2] * statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return Difference(mean, half)


def as_words(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{difference.mean:+.4f}" + ("" if difference.half is None else f" ± {difference.half:.4f}")
