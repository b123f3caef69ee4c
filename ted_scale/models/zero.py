"""Parameters under ZeRO-3: construct them sharded, find a rank's shard, gather them to read.

Everything also works on plain parameters, for tools, tests and a process without DeepSpeed.
"""

import contextlib
from functools import partial

import torch
from torch.overrides import TorchFunctionMode


def is_sharded(parameter) -> bool:
    return hasattr(parameter, "ds_id")


def shape_of(parameter) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)


def start_gather(parameters, *, wait: bool = False) -> None:
    """Start to gather `parameters`, in the background unless `wait`. They stay whole until the next `gathered` of them ends,
    because DeepSpeed's hooks do not release them before. Under ZeRO-3 this is a collective."""
    absent = [p for p in dict.fromkeys(parameters) if is_sharded(p) and p.ds_status.name == "NOT_AVAILABLE"]
    if absent:
        handle = absent[0].all_gather_coalesced(absent)
        for parameter in absent:
            parameter.gather_handle = handle
            parameter.ds_active_sub_modules.add("start_gather")
        if wait:
            handle.wait()


@contextlib.contextmanager
def gathered(parameters):
    """Inside the context `parameters` are whole; after it they are shards again. Only the device waits, never the host."""
    parameters = list(dict.fromkeys(parameters))
    start_gather(parameters)
    ours = [p for p in parameters if getattr(p, "gather_handle", None) is not None]
    for parameter in ours:
        parameter.gather_handle.wait()
        parameter.gather_handle = None
        parameter.ds_active_sub_modules.discard("start_gather")
    try:
        yield
    finally:
        if ours:
            ours[0].partition(ours)


@contextlib.contextmanager
def sharded_construction(ds_config: dict, overrides: tuple | None = None, group=None):
    """A context in which new parameters are sharded over `group` (default: all ranks). DeepSpeed alone would create every tensor
    on the device in the training type, also buffers: rotary frequencies would be bf16. With `overrides=()` only parameters are
    created on the device, and all other tensors are created on the CPU in the family's own type."""
    import deepspeed

    # The type comes from the configuration, because DeepSpeed 0.19 ignores an explicit dtype if fp16 is not supported.
    chosen = {} if overrides is None else {"tensor_overrides": overrides}
    context = deepspeed.zero.Init(config_dict_or_path=ds_config, data_parallel_group=group, **chosen)
    context._zero_init_param = partial(shard, context)
    with context, contextlib.nullcontext() if overrides is None else EmptyOnDevice(context.local_device):
        yield context.local_device


@contextlib.contextmanager
def bare_construction(device):
    """A context in which new parameters are whole. Large ones are created on the device, so they never use the host's memory."""
    with EmptyOnDevice(device):
        yield device


class EmptyOnDevice(TorchFunctionMode):
    """Puts the result of torch.empty, which creates parameters, on a device. Other functions are not changed."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": self.device}
        return function(*args, **kwargs)


def shard(context, parameter) -> None:
    """Shard a parameter without DeepSpeed's broadcast from rank 0. It is not needed, because every value is later read from a
    file, or drawn from the same seed on every rank. So the memory of a whole tensor is never touched."""
    context._convert_to_deepspeed_param(parameter)
    parameter.partition()


def shard_range(parameter) -> tuple[int, int]:
    """The range of the flattened tensor that this rank's shard holds."""
    size = parameter.ds_tensor.numel()
    first = min(torch.distributed.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return first, min(first + size, parameter.ds_numel)


def without_padding(parameter, shard) -> torch.Tensor:
    """A shard of the parameter, its gradient or its master, without the padding, whose values are never set."""
    first, last = shard_range(parameter)
    return shard.flatten()[: last - first]


def forget_gradients(module) -> None:
    """Remove old gradients. ZeRO-3 keeps a parameter's last gradient until there is a new one, so an unused parameter would count
    in the gradient norm for ever."""
    from deepspeed.utils import safe_set_local_grad

    for parameter in module.parameters():
        if is_sharded(parameter) and parameter.requires_grad:
            safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
