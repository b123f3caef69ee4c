"""When gradients are reduced over the ranks: after each micro-batch, or once a step.

Note: torch sums gradients in the type of their weights. In bf16 the sum of many micro-batches would lose what each of them adds,
so gradients that wait for the end of their step are summed in fp32, as ZeRO-3 sums its parts.
"""

import contextlib

import torch
import torch.distributed as dist


@contextlib.contextmanager
def reducing(engine, *, once: bool):
    """Around the backwards of a step. With `once` each rank sums whole gradients, and they are reduced when the context ends: no
    reduction overlaps a backward then."""
    with engine.coalesce_grad_reduction() if once and dist.get_world_size() > 1 else contextlib.nullcontext():
        try:
            yield
        except BaseException:
            # DeepSpeed reduces whatever ends its context. Ranks without this fault would not join, and nobody would hear of it.
            engine._flush_coalesced_reduction_zero3 = lambda optimizer: None
            raise
    engine.set_gradient_accumulation_boundary(True)  # DeepSpeed puts back what it was when the context began


def sum_in_fp32(parameters) -> None:
    """Before the first backward."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32
