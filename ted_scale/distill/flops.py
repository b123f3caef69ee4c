"""FLOPs by one convention, the only place that counts them; docs/flops.md says it in words.

A multiply-add of a matrix product is 2, and nothing else is counted: no look-up, so an input embedding is none and a tied one
counts once, as the output projection; no norm, softmax, rotation, recurrence, element-wise loss or optimizer. A query's scores
and their sum over values count for the keys that it may see, itself among them. Backward is a product's gradients that are
wanted: two where it trains and its input does, one where only one of them has a gradient. All figures are of one token.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy

from ted_scale.distill.filters import has_lift
from ted_scale.models.anatomy import Anatomy

Keys = Callable[[int | None], float]  # a layer's window → keys that a query sees, on average


class Work(NamedTuple):
    """What the step's mathematics asks for, and what is computed a second time to spare memory."""

    model: float
    again: float = 0.0


def keys_of(lengths: Sequence[int]) -> Keys:
    """Of causal documents of these lengths; a row that is one text is one of them."""
    lengths = numpy.asarray(lengths, numpy.int64)

    @lru_cache
    def keys(window: int | None) -> float:
        most = lengths if window is None else numpy.minimum(lengths, window)
        return float((most * (most + 1) // 2 + (lengths - most) * most).sum() / numpy.sum(lengths))

    return keys


def lengths_of(batches) -> list[int]:
    """Of the texts in a step's batches."""
    apart = [length for batch in batches if batch.packing for length in batch.packing.lengths]
    return apart or [batches[0].tokens_BT.shape[1]]


def body_flops(anatomy: Anatomy, keys: Keys) -> float:
    """Forward through all blocks and whatever else is a product before the output projection."""
    return 2 * anatomy.matrices + sum(2 * width * keys(window) for width, window in anatomy.scores)


def head_flops(anatomy: Anatomy, vocabulary: int | None = None) -> float:
    """Forward of the output projection, over a part of the vocabulary where only that is asked for."""
    return 2 * anatomy.head_width * min(anatomy.vocab_size, vocabulary or anatomy.vocab_size)


def filter_flops(width_in: int, width_out: int) -> float:
    """Forward of one filter's linear map."""
    return 2 * width_in * width_out


def mlp_flops(width: int, hidden: int) -> float:
    """Forward of one filter's residual MLP: up, and as much down."""
    return 4 * width * hidden


def step_flops(plan, stage, step: int, keys: Keys) -> Work:
    """Of the step after `step` steps of the run, on both sides."""
    weights = stage.weights(step)
    if stage.learns_filters:
        return Work(bodies_flops(plan, keys) + stage_one_flops(plan, *drawn(plan)))
    student = head_flops(plan.student)
    teacher = head_flops(plan.teacher, plan.student.vocab_size) if weights.kl else 0
    body = body_flops(plan.student, keys)
    total = 3 * (body + student) + teacher
    if plan.teacher and (weights.kl or weights.layer):
        total += body_flops(plan.teacher, keys)
    if weights.layer:
        total += 3 * filters_flops(plan, plan.student)
        total += filters_flops(plan, plan.teacher) if plan.run.method == "ted" else 0
    again = body if plan.run.student.gradient_checkpointing else 0
    return Work(total, again + (student + teacher if plan.run.loss.mode == "strict" else 0))


def bodies_flops(plan, keys: Keys) -> float:
    """Both bodies' forward: what stage I's heads are held against."""
    return body_flops(plan.student, keys) + body_flops(plan.teacher, keys)


def filters_flops(plan, anatomy: Anatomy) -> float:
    """Forward of all pairs' filters of one side."""
    mlp = plan.run.filters.mlp
    return len(plan.pairs) * (filter_flops(anatomy.width, plan.width) + mlp_flops(anatomy.width, mlp))


def stage_one_flops(plan, tokens: float, pairs: float) -> float:
    """Filters, lifts and heads of both sides, forward and backward, where a share of the tokens and of the pairs is read. The
    states below a filter have no gradient, so its map has one of two; a frozen head has none of its own."""
    filters, count = plan.run.filters, len(plan.pairs)
    lift = 3 * filter_flops(plan.width, plan.teacher.width) if has_lift(plan.run, plan.teacher) else 0
    total = 0.0
    for anatomy, head in ((plan.student, head_side(plan)), (plan.teacher, plan.teacher)):
        linear, mlp = filter_flops(anatomy.width, plan.width), mlp_flops(anatomy.width, filters.mlp)
        read = (3 if mlp else 2) * linear + lift + stage_one_head_flops(plan, head)
        total += count * (tokens * pairs * read + 2.5 * mlp)  # an MLP bends all rows, of which some are read
    return total


def head_side(plan) -> Anatomy:
    """Through whose head the student's filtered states are read."""
    return plan.student if plan.run.filters.head == "own" else plan.teacher


def stage_one_head_flops(plan, head: Anatomy) -> float:
    """One filtered state through a head and back to the state; a head of the filter's own learns, too."""
    if plan.run.filters.head == "per_layer":
        return 3 * 2 * plan.width * head.vocab_size
    return 2 * head_flops(head)


def drawn(plan) -> tuple[float, float]:
    """The shares of tokens and of pairs that stage I reads a step."""
    filters, count = plan.run.filters, len(plan.pairs)
    return filters.sample_tokens, min(filters.sample_pairs or count, count) / count
