"""Fewer points of a curve, of which none is missed: of each stretch the first, the least, the greatest and the last stay.

So a spike of one step in 100,000 is drawn at its full height. Note: a NaN is kept as a gap, one for a stretch.
"""

import numpy as np


def thin(steps, values, stretches: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) with at most 5 points for each of so many stretches of equal length."""
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    if len(steps) <= 4 * stretches:
        return steps, values
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(steps)), stretches):
        there = part[np.isfinite(values[part])]
        if len(there):
            kept |= {there[0], there[-1], there[np.argmin(values[there])], there[np.argmax(values[there])]}
        if len(there) < len(part):
            kept.add(part[~np.isfinite(values[part])][0])
    chosen = np.array(sorted(kept))
    return steps[chosen], values[chosen]


def binned(steps, values, first: float, last: float, bins: int) -> np.ndarray:
    """The greatest value of each of so many equal stretches of steps; NaN where there is none."""
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    there = np.isfinite(values)
    place = np.clip(((steps[there] - first) / max(last - first, 1) * bins).astype(int), 0, bins - 1)
    found = np.full(bins, -np.inf)
    np.maximum.at(found, place, values[there])
    return np.where(np.isfinite(found), found, np.nan)
