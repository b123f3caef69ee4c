"""Bytes that a measurement takes of a rank's device while it lasts. They are free again before the loss itself begins.

Note: what waits for the end of the step, a pair's three Gram matrices (0.75 MiB) and some numbers, is not counted.
"""

import torch

from ted_scale.kernels.products import rows_per_chunk
from ted_scale.vitals import head
from ted_scale.vitals.vitals import PARTS, TOKENS_OF_PAIR, TOKENS_OF_PART, a_step

GRAMS = 6  # of a pair: three, and together once more


def moments(plan, b: int, device: str, early: float) -> list[dict[str, float]]:
    """Of the output, before its loss, and of a pair, after it; `early` are the gradients that losses have formed by then."""
    output, pair = of_output(plan, b, device), of_pair(plan, b, device)
    every: list[dict[str, float]] = [{"vitals": output}, {"vitals": pair, "loss gradients": early}]
    return [moment for moment in every if moment["vitals"]]


def of_output(plan, b: int, device: str) -> int:
    """The logits of a part, or of several where a step measures more; on a CPU in bf16 both heads in fp32, too."""
    sides, every = [plan.student, plan.teacher], plan.run.vitals.every
    if plan.teacher is None or not every:
        return 0
    tokens = TOKENS_OF_PART * min(PARTS, a_step(PARTS + len(plan.pairs), every))
    each = head.bytes_a_row(sum(side.vocab_size for side in sides))
    heads = 4 * sum(side.vocab_size * side.head_width for side in sides) if device == "cpu" and b == 2 else 0
    return rows_per_chunk(tokens, each, torch.device(device), None) * each + heads


def of_pair(plan, b: int, device: str) -> int:
    """The sampled state, both filtered ones, and what its Gram matrix is formed of; on a CPU in bf16 a filter in fp32, too."""
    if not (plan.pairs and plan.run.vitals.every):
        return 0
    state, filtered = plan.student.width, plan.width
    entries = state + 2 * filtered + 3 * max(state, filtered) + GRAMS * TOKENS_OF_PAIR
    filters = 4 * filtered * max(state, plan.teacher.width) if device == "cpu" and b == 2 else 0
    return 4 * TOKENS_OF_PAIR * entries + filters
