"""FLOPs, counted by one convention and only here; docs/flops.md explains it.

A multiply-add of a matrix product counts 2. Nothing else counts: no look-up, norm, softmax, rotation, recurrence, element-wise
loss or optimizer. So an input embedding counts 0, and a tied one counts once, as the output projection. For each key that a query
may see, also its own, the score and its part of the sum over values count. The backward counts each gradient that is needed: of a
product's weight, of its input, or of both. All figures are for one token.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy

from ted_scale.distill.filters import has_lift
from ted_scale.distill.normalization import logit_passes
from ted_scale.models import lora
from ted_scale.models.anatomy import Anatomy

Keys = Callable[[int | None], float]  # a layer's window → the average number of keys that a query sees


class Work(NamedTuple):
    """FLOPs of the step's mathematics, and FLOPs of what is computed a second time to save memory."""

    model: float
    again: float = 0.0


def keys_of(lengths: Sequence[int]) -> Keys:
    """For causal documents of these lengths. A row without borders counts as one document."""
    lengths = numpy.asarray(lengths, numpy.int64)

    @lru_cache
    def keys(window: int | None) -> float:
        most = lengths if window is None else numpy.minimum(lengths, window)
        return float((most * (most + 1) // 2 + (lengths - most) * most).sum() / numpy.sum(lengths))

    return keys


def lengths_of(batches) -> list[int]:
    """The lengths of the documents in a step's batches."""
    apart = [length for batch in batches if batch.packing for length in batch.packing.lengths]
    first = batches[0]
    return apart or [first.tokens_BT.shape[1] * (first.share.of if first.share else 1)]


def body_flops(anatomy: Anatomy, keys: Keys) -> float:
    """FLOPs of the forward of all products before the output projection."""
    return 2 * anatomy.matrices + attention_flops(anatomy, keys)


def attention_flops(anatomy: Anatomy, keys: Keys) -> float:
    """The part of the body's FLOPs that are not products with a weight: scores, and their sums over values."""
    return sum(2 * width * keys(window) for width, window in anatomy.scores)


def head_flops(anatomy: Anatomy, vocabulary: int | None = None) -> float:
    """FLOPs of the forward of the output projection, for the first `vocabulary` entries if that is given."""
    return 2 * anatomy.head_width * min(anatomy.vocab_size, vocabulary or anatomy.vocab_size)


def adapter_flops(plan) -> float:
    """Forward of the student's adapters."""
    return 2 * lora.parameters(plan.student, plan.run.student.lora)


def student_flops(plan, keys: Keys) -> tuple[float, float]:
    """(forward, backward) of the student's body in stage II. For a frozen matrix, only the gradient of its input is computed."""
    forward, scores, adapters = body_flops(plan.student, keys), attention_flops(plan.student, keys), adapter_flops(plan)
    backward = forward + scores if plan.run.student.lora else 2 * forward
    return forward + adapters, backward + 2 * adapters


def filter_flops(width_in: int, width_out: int) -> float:
    """Forward of one filter's linear map."""
    return 2 * width_in * width_out


def mlp_flops(width: int, hidden: int) -> float:
    """Forward of one filter's residual MLP: up and down cost the same."""
    return 4 * width * hidden


def step_flops(plan, stage, step: int, keys: Keys) -> Work:
    """The work of student and teacher in the step after `step` steps of the run."""
    parts = of_parts(plan, stage, step, keys).values()
    return Work(*(sum(column) for column in zip(*parts, strict=True)))


def of_parts(plan, stage, step: int, keys: Keys) -> dict[str, Work]:
    """The work of that step, by the part of the step that does it."""
    weights = stage.weights(step)
    if stage.learns_filters:
        bodies = {"teacher": Work(body_flops(plan.teacher, keys)), "student": Work(body_flops(plan.student, keys))}
        return {**bodies, "filters": Work(stage_one_flops(plan, *sampled(plan)))}
    student, asked = head_flops(plan.student) if weights.ce or weights.kl else 0, 1 / stage.asks_every
    teacher = asked * head_flops(plan.teacher, plan.student.vocab_size) if weights.kl else 0
    body, strict = student_flops(plan, keys), plan.run.loss.mode == "strict"
    parts = {"student": Work(sum(body), body[0] if plan.run.student.gradient_checkpointing else 0)}
    head = 2 if plan.run.student.lora else 3  # a frozen head needs no gradient of its weight
    calls = logit_passes(plan.run.loss, weights.kl)
    parts["head"] = Work(
        head * student + teacher, (calls - 1) * head * student + (calls * student + teacher if strict else 0)
    )
    if plan.teacher and (weights.kl or weights.layer):
        parts["teacher"] = Work(asked * body_flops(plan.teacher, keys))
    if weights.layer:
        frozen = filters_flops(plan, plan.teacher) if plan.run.method == "ted" else 0
        parts["layer loss"] = Work(asked * (3 * filters_flops(plan, plan.student) + frozen))
    return parts


def bodies_flops(plan, keys: Keys) -> float:
    """The forward of both bodies. The cost of stage I's heads is compared with it."""
    return body_flops(plan.student, keys) + body_flops(plan.teacher, keys)


def filters_flops(plan, anatomy: Anatomy) -> float:
    """Forward of all pairs' filters of one side."""
    mlp = plan.run.filters.mlp
    return len(plan.pairs) * (filter_flops(anatomy.width, plan.width) + mlp_flops(anatomy.width, mlp))


def stage_one_flops(plan, tokens: float, pairs: float) -> float:
    """Filters, lifts and heads of both sides, forward and backward, for the shares of tokens and pairs that are read. The states
    below a filter need no gradient, so only the gradient of the filter's weight is computed. A frozen head's weight has none."""
    filters, count = plan.run.filters, len(plan.pairs)
    lift = 3 * filter_flops(plan.width, plan.teacher.width) if has_lift(plan.run, plan.teacher) else 0
    total = 0.0
    for anatomy, head in ((plan.student, head_side(plan)), (plan.teacher, plan.teacher)):
        linear, mlp = filter_flops(anatomy.width, plan.width), mlp_flops(anatomy.width, filters.mlp)
        read = (3 if mlp else 2) * linear + lift + stage_one_head_flops(plan, head)
        total += count * (tokens * pairs * read + 2.5 * mlp)  # an MLP runs on all rows, not only on those that are read
    return total


def head_side(plan) -> Anatomy:
    """The model whose head reads the student's filtered states."""
    return plan.student if plan.run.filters.head == "own" else plan.teacher


def stage_one_head_flops(plan, head: Anatomy) -> float:
    """Head and backward for one filtered state. A filter's own head is trained, too."""
    if plan.run.filters.head == "per_layer":
        return 3 * 2 * plan.width * head.vocab_size
    return 2 * head_flops(head)


def sampled(plan) -> tuple[float, float]:
    """The shares of tokens and of pairs that stage I reads in a step."""
    filters, count = plan.run.filters, len(plan.pairs)
    return filters.sample_tokens, min(filters.sample_pairs or count, count) / count
