"""How much of a run is trained in a stage: parameters that have masters, moments and gradients.

Note: with student.lora the student's own parameters have none, and so the head has none either.
"""

from ted_scale.distill.filter_sizes import filter_parameters
from ted_scale.distill.stages import Stage
from ted_scale.models import lora


def trained_parameters(plan, stage: Stage) -> int:
    """Parameters of the filters, and in stage II of the student; with adapters of the adapters instead."""
    counts = filter_parameters(plan)
    if stage.learns_filters:
        return sum(counts.values()) + own_heads(plan)
    return (adapters(plan, stage) or plan.student.parameters) + counts["student"]


def adapters(plan, stage: Stage) -> int:
    """Parameters of the student's adapters. Stage I has none."""
    return 0 if stage.learns_filters else lora.parameters(plan.student, plan.run.student.lora)


def head_gradient(plan, stage: Stage) -> int:
    """Elements of the head's gradient. A frozen head has none."""
    is_frozen = stage.learns_filters or plan.run.student.lora
    return 0 if is_frozen else plan.student.vocab_size * plan.student.head_width


def own_heads(plan) -> int:
    """Parameters of the filters' own heads, with `filters.head = "per_layer"`."""
    vocabularies = [a.vocab_size for a in (plan.student, plan.teacher) if a]
    return len(plan.pairs) * (plan.width + 1) * sum(vocabularies) if plan.run.filters.head == "per_layer" else 0
