"""Changes to DeepSpeed's hooks: unneeded work is removed, and one bug is corrected.

Everything here uses internals of DeepSpeed 0.19.8. tests/test_distributed.py -k asks guards it: the test counts waits and
collectives of a micro-step. The bug: DeepSpeed never forgets which weights stay whole until backward, also after a pass without a
backward. So after a validation before the first step, every backward gathered each weight again, when it was used.
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
    """Remove the hooks that a new engine with this configuration does not need. Its modules `frozen` are not trained."""
    for module in frozen:
        drop_backward_hooks(engine, module)
    cache_signatures(engine)
    zero_single.keep_whole(engine, hook_owner(engine), config["zero_optimization"])


def drop_backward_hooks(engine, module: nn.Module) -> None:
    """For a frozen `module`: its backward then gathers no weights and passes no tensor through hooks."""
    theirs = {id(hooks) for m in module.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)}
    for hook in hook_owner(engine).backward_hooks:
        if id(hook.hooks_dict_ref()) in theirs:
            hook.remove()


def cache_signatures(engine) -> None:
    """Store the signatures that torch would inspect twice for each tensor of a module. This saves time."""
    hooks = [getattr(m, name, None) for m in engine.module.modules() for name in ("pre_bwd_fn", "post_bwd_fn")]
    for function in filter(None, hooks):
        function.forward.__signature__ = inspect.signature(function.forward)


def hook_owner(engine):
    """The object that owns the hooks. In the engine of a frozen model, `optimizer` is that object itself."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


def destroy(engine) -> None:
    """Free the engine and its tensors. DeepSpeed keeps every module in a global list, and this removes it there."""
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not engine.module]
    clear_release_cache()


def clear_release_cache() -> None:
    """Clear DeepSpeed's cache of the weights that a module releases: they depend on the order in which modules run."""
    release_rule().cache_clear()


def release_rule():
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    return inspect.getclosurevars(Coordinator._PartitionedParameterCoordinator__params_to_release).nonlocals["func"]


@functools.cache
def patch_deepspeed() -> None:
    """Replace functions of DeepSpeed. Call it before an engine is made."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partition_parameters, stage3
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    # DeepSpeed uses this only for the gradient's norm. With fp64 it would first copy every gradient to twice its size.
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
    """The gradients of a single rank, which are whole. DeepSpeed would divide them by 1, and gloo would copy them twice."""
    return [gradient.view(-1) for gradient in gradients]


def wait_on_single_rank(handle, private: str, **_) -> None:
    """Do not wait on a single rank, whose weights are always whole. DeepSpeed would make the host wait for the device."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if not getattr(handle, f"{private}complete"):
        parameters = getattr(handle, f"{private}params", None) or [getattr(handle, f"{private}param")]
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        setattr(handle, f"{private}complete", True)
