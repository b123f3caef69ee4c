"""Gradients that wait for the end of their step."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from ted_scale.models import reduction
from ted_scale.models.reduction import reducing, sum_in_fp32


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


def engine_that_notes() -> SimpleNamespace:
    """What DeepSpeed's own context asks of an engine."""
    optimizer = SimpleNamespace(_coalesce_grad_reduction=False, set_gradient_accumulation_boundary=lambda _: None)
    engine = SimpleNamespace(
        optimizer=optimizer, inside_no_sync_ctxt=False, pipeline_parallelism=False, _is_gradient_accumulation_boundary=None,
        managed_gradient_accumulation=lambda: True, zero_optimization_stage=lambda: 3, reduced=0,
    )  # fmt: skip

    def reduce(self, _):
        self.reduced += 1

    engine._flush_coalesced_reduction_zero3 = MethodType(reduce, engine)
    engine.set_gradient_accumulation_boundary = lambda last: None
    engine.coalesce_grad_reduction = MethodType(DeepSpeedEngine.coalesce_grad_reduction, engine)
    return engine


def test_a_rank_that_fails_in_a_step_does_not_wait_for_others_to_reduce_with(monkeypatch):
    """DeepSpeed reduces in any case: a rank out of memory would hang in it, and its reason would never be heard."""
    monkeypatch.setattr(reduction.dist, "get_world_size", lambda: 2)
    engine = engine_that_notes()
    with reducing(engine, once=True):
        pass
    assert engine.reduced == 1
    with pytest.raises(MemoryError), reducing(engine, once=True):
        raise MemoryError
    assert engine.reduced == 1 and not engine.inside_no_sync_ctxt
