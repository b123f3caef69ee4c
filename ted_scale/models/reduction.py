"""When gradients are reduced over the ranks: after each micro-batch, or once a step.

Note: torch sums gradients in the type of their weights. In bf16 the sum would lose what each of many micro-batches adds. So
gradients that are reduced once a step are summed in fp32, as ZeRO-3 sums its parts.
"""

import contextlib

import torch
import torch.distributed as dist


@contextlib.contextmanager
def reducing(engine, *, once: bool):
    """The context for the backwards of a step. With `once` each rank sums whole gradients, which are reduced when the context
    ends. So no reduction overlaps a backward."""
    with engine.coalesce_grad_reduction() if once and dist.get_world_size() > 1 else contextlib.nullcontext():
        try:
            yield
        except BaseException:
            # DeepSpeed would reduce also after an error. The other ranks would not join, and the error would never be reported.
            engine._flush_coalesced_reduction_zero3 = lambda optimizer: None
            raise
    engine.set_gradient_accumulation_boundary(True)  # DeepSpeed restores the value from the start of the context


def sum_in_fp32(parameters) -> None:
    """Make gradients of these parameters fp32. Call it before the first backward."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32
