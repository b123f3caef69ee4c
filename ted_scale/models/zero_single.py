"""The shards of a single rank are whole weights and gradients: nothing is gathered, released or reduced, and no order of
modules is learnt.

A weight's data and its shard are the same memory, so an update of the shard is one of the weight. What is offloaded lies in
the host's memory; for it DeepSpeed's own way stays.
"""

import functools

import torch.distributed as dist


def use(zero_optimization: dict) -> None:
    """For the engines that are built from now on."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload as Hooks
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Optimizer

    for cls, part, methods in (
        (Coordinator, "offload_param", WEIGHTS), (Hooks, "offload_param", ALL_WEIGHTS),
        (Optimizer, "offload_optimizer", GRADIENTS),
    ):  # fmt: skip
        device = (zero_optimization.get(part) or {}).get("device", "none")
        is_whole = dist.get_world_size() == 1 and device == "none"
        for name, theirs in originals(cls, *methods).items():
            setattr(cls, name, methods[name] if is_whole else theirs)


@functools.cache
def originals(cls: type, *names: str) -> dict:
    return {name: getattr(cls, name) for name in names}


def show_whole(_, module, forward: bool) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
    from deepspeed.utils import z3_leaf_module

    for weight in iter_params(module, recurse=z3_leaf_module(module)):
        if weight.data_ptr() != weight.ds_tensor.data_ptr():
            weight.data = weight.ds_tensor.data.view(weight.ds_shape)
        weight.ds_status = ZeroParamStatus.AVAILABLE


def add_gradient(optimizer, weight) -> None:
    """To the sum of the step, in one pass."""
    if optimizer._coalesce_grad_reduction or not getattr(weight, "ds_grad_is_ready", True):
        return
    summed = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[weight.ds_id]
    (summed.add_ if optimizer.micro_step_id else summed.copy_)(weight.grad.reshape(-1))
    weight.grad = None


def nothing(*_, **__) -> None:
    pass


WEIGHTS = {
    "fetch_sub_module": show_whole,
    **dict.fromkeys(("release_sub_module", "trace_prologue", "record_module", "reset_step"), nothing),
}
ALL_WEIGHTS = {"partition_all_parameters": nothing}
GRADIENTS = {"reduce_ready_partitions_and_remove_grads": add_gradient}
