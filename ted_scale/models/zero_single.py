"""The shards of a single rank are whole weights and gradients. So nothing is gathered, released or reduced, and no module needs a
hook.

A weight's data and its shard are the same memory, so an update of the shard also updates the weight. Offloaded weights are in the
host's memory, and DeepSpeed handles them as usual.
"""

from functools import partial

import torch.distributed as dist


def is_whole(zero_optimization: dict, world: int, part: str = "offload_param") -> bool:
    """Whether one of `world` ranks has whole weights on its device, or with part = "offload_optimizer" whole gradients."""
    device = (zero_optimization.get(part) or {}).get("device", "none")
    return world == 1 and device == "none"


def keep_whole(engine, hooks, zero_optimization: dict) -> None:
    """Keep a new engine's weights whole, and remove the hooks of its modules, which `hooks` owns."""
    world = dist.get_world_size()
    if is_whole(zero_optimization, world):
        hooks.destroy()
        hooks.partition_all_parameters = nothing
        engine.optimizer.persistent_parameters = []  # DeepSpeed would gather these after every step
        show_whole(engine.module)
    if is_whole(zero_optimization, world, "offload_optimizer"):
        engine.optimizer.reduce_ready_partitions_and_remove_grads = partial(add_gradient, engine.optimizer)


def show_whole(module) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for weight in module.parameters():
        weight.data = weight.ds_tensor.data.view(weight.ds_shape)
        weight.ds_status = ZeroParamStatus.AVAILABLE


def add_gradient(optimizer, weight) -> None:
    """Add a weight's gradient to the step's sum, in one pass."""
    if optimizer._coalesce_grad_reduction or not getattr(weight, "ds_grad_is_ready", True):
        return
    summed = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[weight.ds_id]
    (summed.add_ if optimizer.micro_step_id else summed.copy_)(weight.grad.reshape(-1))
    weight.grad = None


def nothing() -> None:
    pass
