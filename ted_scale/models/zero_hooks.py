"""DeepSpeed's hooks made lean: what they do for others and need not do here, and what they would get wrong.

Everything here reaches into DeepSpeed 0.19.8 and is held by tests/test_distributed.py -k asks, which counts what a micro-step
waits for and sends. The surprise: which weights stay whole until backward is remembered for ever, also from a pass that had
no backward. A validation before the first step thus had every later backward gather each weight again, when it was needed.
"""

import functools
import inspect

import torch.distributed as dist
from torch import nn


def blocks_at_once(blocks) -> None:
    """A block's weights are asked for together, by one hook: call it before the engine is made."""
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)


def never_backward(engine, module: nn.Module) -> None:
    """Of `module`, which has no gradient of its own, nothing is gathered in backward, and no tensor goes through its hooks."""
    theirs = {id(hooks) for m in module.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)}
    for hook in offload_of(engine).backward_hooks:
        if id(hook.hooks_dict_ref()) in theirs:
            hook.remove()


def quick_signatures(engine) -> None:
    """torch inspects a function's signature at each of its calls, here two a tensor and module, and one a linear layer: an
    answer at hand is quick."""
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    hooks = [getattr(m, name, None) for m in engine.module.modules() for name in ("pre_bwd_fn", "post_bwd_fn")]
    for function in (*filter(None, hooks), LinearFunctionForZeroStage3):
        function.forward.__signature__ = inspect.signature(function.forward)


def offload_of(engine):
    """What owns the hooks: a frozen model's optimizer is nothing else."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


def destroy(engine) -> None:
    """The engine and all that it holds, where DeepSpeed keeps the module in a list of its own for ever."""
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not engine.module]
    forget_releases()


def forget_releases() -> None:
    """Which weights a module releases follows from the order of modules, of which this is a memory."""
    release_rule().cache_clear()


def release_rule():
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    return inspect.getclosurevars(Coordinator._PartitionedParameterCoordinator__params_to_release).nonlocals["func"]


@functools.cache
def mend() -> None:
    """Once a process, before the first engine."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partition_parameters, stage3
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    # Asked for the gradient's norm alone, which would first copy every gradient to twice its size.
    get_accelerator().is_fp64_supported = lambda: False
    if dist.get_world_size() == 1:
        stage3.reduce_scatter_coalesced = whole
    invalidate = Coordinator._invalidate_trace

    def invalidate_releases_too(coordinator) -> None:
        forget_releases()
        invalidate(coordinator)

    Coordinator._invalidate_trace = invalidate_releases_too
    for handle in (partition_parameters.NoGatherHandle, partition_parameters.NoGatherCoalescedHandle):
        handle.wait = functools.partialmethod(wait_alone, f"_{handle.__name__}__")


def whole(gradients, group=None) -> list:
    """One rank alone keeps all of every gradient: DeepSpeed would divide it by 1, and gloo copy it there and back."""
    return [gradient.view(-1) for gradient in gradients]


def wait_alone(handle, private: str, **_) -> None:
    """One rank alone has its weights whole already: DeepSpeed would have the host wait until the device is done."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if not getattr(handle, f"{private}complete"):
        parameters = getattr(handle, f"{private}params", None) or [getattr(handle, f"{private}param")]
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        setattr(handle, f"{private}complete", True)
