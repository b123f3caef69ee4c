"""Gradient norms of the student and of its filters apart, from what DeepSpeed works out for the one norm it knows.

It sums squares sub-group by sub-group, over all ranks, and no sub-group is of two parameter groups: which part a sub-group is
of is known, and nothing is computed or sent a second time.
"""

import torch

SIDES = {"decay": "student", "plain": "student", "filters": "filters"}  # by the role of a parameter group


def sides_of(zero) -> list[str]:
    """Of each sub-group of a ZeRO-3 optimizer."""
    return [SIDES[zero.param_groups[group]["role"]] for group in zero.sub_group_to_group_id.values()]


def norms_apart(sides: list[str], norms: list) -> dict[str, torch.Tensor]:
    """Each side's norm from its sub-groups', where DeepSpeed has them: on the host for gradients that are offloaded, which
    it scales there. Nobody waits for them."""
    parts: dict[str, list] = {side: [] for side in sides}
    for side, norm in zip(sides, norms, strict=True):
        parts[side].append(torch.as_tensor(norm, dtype=torch.float32))
    return {side: torch.linalg.vector_norm(torch.stack(part)) for side, part in parts.items()}
