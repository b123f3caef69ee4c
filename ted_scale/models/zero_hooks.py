"""Changes to DeepSpeed's hooks: work that is not needed here is removed, and one error is corrected.

Everything here uses internals of DeepSpeed 0.19.8. tests/test_distributed.py -k asks guards it: the test counts waits and
collectives of a micro-step. DeepSpeed remembers for ever which weights stay whole until backward, also from a pass without a
backward. So after a validation before the first step, every backward gathered each weight again, at the moment of its use.
"""

import functools
import inspect

import torch.distributed as dist
from torch import nn

from ted_scale.models import zero_lean, zero_single


def gather_whole_blocks(blocks) -> None:
    """One hook gathers all weights of a block together. Call it before the engine is created."""
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)


def trim(engine, config: dict, frozen=()) -> None:
    """Removes the hooks that do nothing for a new engine of this configuration, whose modules `frozen` are not trained."""
    for module in frozen:
        drop_backward_hooks(engine, module)
    cache_signatures(engine)
    zero_single.keep_whole(engine, hook_owner(engine), config["zero_optimization"])


def drop_backward_hooks(engine, module: nn.Module) -> None:
    """For a frozen `module`: backward gathers none of its weights and passes no tensor through its hooks."""
    theirs = {id(hooks) for m in module.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)}
    for hook in hook_owner(engine).backward_hooks:
        if id(hook.hooks_dict_ref()) in theirs:
            hook.remove()


def cache_signatures(engine) -> None:
    """torch inspects a function's signature at every call: two calls for each tensor of a module. A stored one saves that
    time."""
    hooks = [getattr(m, name, None) for m in engine.module.modules() for name in ("pre_bwd_fn", "post_bwd_fn")]
    for function in filter(None, hooks):
        function.forward.__signature__ = inspect.signature(function.forward)


def hook_owner(engine):
    """The object that owns the hooks. In the engine of a frozen model, `optimizer` is that object itself."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


def destroy(engine) -> None:
    """Frees the engine and its tensors. DeepSpeed keeps every module in a global list, from which this one is removed."""
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not engine.module]
    clear_release_cache()


def clear_release_cache() -> None:
    """DeepSpeed caches which weights a module releases; this depends on the order in which modules run."""
    release_rule().cache_clear()


def release_rule():
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    return inspect.getclosurevars(Coordinator._PartitionedParameterCoordinator__params_to_release).nonlocals["func"]


@functools.cache
def patch_deepspeed() -> None:
    """Before an engine is made."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partition_parameters, stage3
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    # DeepSpeed asks this only for the gradient's norm. With fp64 it would first copy every gradient to twice its size.
    get_accelerator().is_fp64_supported = lambda: False
    if dist.get_world_size() == 1:
        stage3.reduce_scatter_coalesced = flat_gradients
    invalidate = Coordinator._invalidate_trace

    def invalidate_with_cache(coordinator) -> None:
        clear_release_cache()
        invalidate(coordinator)

    Coordinator._invalidate_trace = invalidate_with_cache
    zero_lean.patch()
    for handle in (partition_parameters.NoGatherHandle, partition_parameters.NoGatherCoalescedHandle):
        handle.wait = functools.partialmethod(wait_on_single_rank, f"_{handle.__name__}__")


def flat_gradients(gradients, group=None) -> list:
    """A single rank keeps every gradient whole: DeepSpeed would divide it by 1, and gloo would copy it twice."""
    return [gradient.view(-1) for gradient in gradients]


def wait_on_single_rank(handle, private: str, **_) -> None:
    """A single rank always has whole weights: DeepSpeed would make the host wait for the device."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if not getattr(handle, f"{private}complete"):
        parameters = getattr(handle, f"{private}params", None) or [getattr(handle, f"{private}param")]
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        setattr(handle, f"{private}complete", True)
