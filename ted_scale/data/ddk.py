"""Shares of a blend by DDK (Liu et al., NeurIPS 2024): a run reads more of a corpus the further the student is behind its teacher
there.

These are pure functions of losses and of the previous weights. feed.py measures and applies them. Note: the ratio of two
perplexities is an exponent here, and an untrained student has ratios of thousands. So all values stay logarithms until they are
normalized.
"""

import math


def discrepancies(student_losses: list[float], teacher_losses: list[float]) -> list[float]:
    """The student's perplexity divided by the teacher's, one number for each corpus."""
    return [math.exp(min(s - t, 700.0)) for s, t in zip(student_losses, teacher_losses, strict=True)]


def first_weights(prior: list[float], gaps: list[float], smoothing: float) -> list[float]:
    """r_0: proportional to exp(gap) times the run file's weight of each corpus. It is smoothed like all later weights."""
    return smoothed([math.log(p) + gap for p, gap in zip(prior, gaps, strict=True)], smoothing)


def next_weights(before: list[float], gaps: list[float], smoothing: float) -> list[float]:
    """r_t+1 = smoothing * psi / sum(psi) + (1 - smoothing) / N, where psi = r_t * exp(gap); r_t are the weights before."""
    return smoothed([math.log(r) + gap if r else -math.inf for r, gap in zip(before, gaps, strict=True)], smoothing)


def smoothed(logs: list[float], smoothing: float) -> list[float]:
    """Normalized and smoothed weights. None is below (1 - smoothing) / N, because a weight of 0 would stay 0."""
    return [smoothing * share + (1 - smoothing) / len(logs) for share in softmax(logs)]


def softmax(logs: list[float]) -> list[float]:
    top = max(logs)
    scaled = [math.exp(x - top) for x in logs]
    return [x / math.fsum(scaled) for x in scaled]
