"""Shares of a blend by DDK (Liu et al., NeurIPS 2024): the further the student is behind its teacher in a corpus, the more of
it is read.

Pure functions of perplexities and of the weights before; feed.py measures and applies them. The surprise: the ratio of
two perplexities is an exponent here, and a student that knows nothing yet has ratios of thousands, so that everything
is kept in logarithms until the sum is 1.
"""

import math


def discrepancies(student_losses: list[float], teacher_losses: list[float]) -> list[float]:
    """Perplexity of the student over the teacher's, a number a corpus."""
    return [math.exp(min(s - t, 700.0)) for s, t in zip(student_losses, teacher_losses, strict=True)]


def first_weights(prior: list[float], gaps: list[float], smoothing: float) -> list[float]:
    """r_0: proportional to exp(gap), times what the run file says of each corpus, and smoothed like all that follow."""
    return smoothed([math.log(p) + gap for p, gap in zip(prior, gaps, strict=True)], smoothing)


def next_weights(before: list[float], gaps: list[float], smoothing: float) -> list[float]:
    """r_t+1 = smoothing * psi / sum(psi) + (1 - smoothing) / N, where psi = r_t * exp(gap): its momentum is r_t."""
    return smoothed([math.log(r) + gap if r else -math.inf for r, gap in zip(before, gaps, strict=True)], smoothing)


def smoothed(logs: list[float], smoothing: float) -> list[float]:
    """No corpus falls below (1 - smoothing) / N, for one that is not read any more has no way to show that it is needed."""
    return [smoothing * share + (1 - smoothing) / len(logs) for share in softmax(logs)]


def softmax(logs: list[float]) -> list[float]:
    top = max(logs)
    scaled = [math.exp(x - top) for x in logs]
    return [x / math.fsum(scaled) for x in scaled]
