"""Gradients that wait for the end of their step."""

import torch

from ted_scale.models.reduction import sum_in_fp32


def summed(weight) -> float:
    """Of a gradient of 1 and 256 of 1/512 each."""
    for size in (1.0, *[2.0**-9] * 256):
        (weight * size).sum().backward()
    return weight.grad.item()


def test_small_gradients_count_in_a_sum_of_bf16_weights():
    """In bf16, 1 + 1/512 is 1."""
    plain, ours = (torch.ones(1, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    sum_in_fp32([ours])
    assert (summed(plain), summed(ours)) == (1.0, 1.5)
