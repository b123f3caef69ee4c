"""ZeRO-3's view of a parameter: build sharded, fill each rank's shard straight from safetensors, gather to read.

Transformers' own loader merges all files on rank 0 first. Here every rank reads only the rows it keeps: peak host
memory is one rank's part, whatever the size of the model. Everything works on plain (unsharded) parameters too, which
is what tools, tests and a single process without DeepSpeed have.
"""

import contextlib
from functools import partial

import torch
from torch.overrides import TorchFunctionMode


def is_sharded(parameter) -> bool:
    return hasattr(parameter, "ds_id")


def shape_of(parameter) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)


def ask(parameters, *, whole: bool = False) -> None:
    """Begin to gather `parameters` for the next `gathered` of them, until when no hook of DeepSpeed's gives them back. A
    collective under ZeRO-3; nobody waits for it here, unless they must be `whole` at once."""
    absent = [p for p in dict.fromkeys(parameters) if is_sharded(p) and p.ds_status.name == "NOT_AVAILABLE"]
    if absent:
        handle = absent[0].all_gather_coalesced(absent)
        for parameter in absent:
            parameter.asked = handle
            parameter.ds_active_sub_modules.add("asked")
        if whole:
            handle.wait()


@contextlib.contextmanager
def gathered(parameters):
    """Whole values of `parameters` inside the context, shards again after it; the device alone waits, never the host."""
    parameters = list(dict.fromkeys(parameters))
    ask(parameters)
    ours = [p for p in parameters if getattr(p, "asked", None) is not None]
    for parameter in ours:
        parameter.asked.wait()
        parameter.asked = None
        parameter.ds_active_sub_modules.discard("asked")
    try:
        yield
    finally:
        if ours:
            ours[0].partition(ours)


@contextlib.contextmanager
def sharded_construction(ds_config: dict | None, overrides: tuple | None = None):
    """DeepSpeed would make every tensor on the device and in the training type, buffers and what they are worked out from as
    well: rotary frequencies in bf16. Without `overrides` a family makes its own as it means them, on the CPU, and only
    parameters are on the device from the start."""
    if ds_config is None:
        yield None
        return
    import deepspeed

    # The type comes from the configuration: where fp16 is not supported, DeepSpeed 0.19 ignores an explicit dtype.
    chosen = {} if overrides is None else {"tensor_overrides": overrides}
    context = deepspeed.zero.Init(config_dict_or_path=ds_config, **chosen)
    context._zero_init_param = partial(shard, context)
    with context, contextlib.nullcontext() if overrides is None else EmptyOn(context.local_device):
        yield context


class EmptyOn(TorchFunctionMode):
    """torch.empty, of which parameters are made, on a device; all else stays where it is made."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": self.device}
        return function(*args, **kwargs)


def shard(context, parameter) -> None:
    """Without DeepSpeed's broadcast of every whole tensor from rank 0: what is not read from a file afterwards is drawn
    from the same seed on every rank. A whole tensor's memory is thus never even touched."""
    context._convert_to_deepspeed_param(parameter)
    parameter.partition()


def own_range(parameter) -> tuple[int, int]:
    """The elements of the flattened tensor that this rank's shard holds."""
    size = parameter.ds_tensor.numel()
    first = min(torch.distributed.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return first, min(first + size, parameter.ds_numel)


def own_part(parameter, shard) -> torch.Tensor:
    """A shard (of the parameter, its gradient, its master) without what pads it: that is never set."""
    first, last = own_range(parameter)
    return shard.flatten()[: last - first]


def forget_gradients(module) -> None:
    """ZeRO-3 keeps a parameter's last gradient until a new one comes: without this an unused parameter would count in
    the gradient norm for ever."""
    from deepspeed.utils import safe_set_local_grad

    for parameter in module.parameters():
        if is_sharded(parameter) and parameter.requires_grad:
            safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))


def resident_share(module) -> float:
    """Elements of this rank's parameters, gathered ones and shards alike, as a share of the whole module's."""
    parameters = list(module.parameters())
    whole = sum(torch.Size(shape_of(p)).numel() for p in parameters)
    here = sum(p.data.numel() + (p.ds_tensor.numel() if is_sharded(p) else 0) for p in parameters)
    return here / whole
