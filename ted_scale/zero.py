"""ZeRO-3's view of a parameter: build sharded, fill each rank's shard straight from safetensors, gather to read.

Transformers' own loader merges all files on rank 0 first. Here every rank reads only the rows it keeps: peak host
memory is one rank's part, whatever the size of the model. Everything works on plain (unsharded) parameters too, which
is what tools, tests and a single process without DeepSpeed have.
"""

import contextlib
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from ted_scale.errors import UserError
from ted_scale.models import Anatomy, empty_model, read_config


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


def build_network(anatomy: Anatomy, *, ds_config: dict | None, dtype, init: str = "weights", seed: int = 0):
    """The causal LM, sharded as it is made where `ds_config` is given, holding its folder's or fresh random weights."""
    config = read_config("model", anatomy.folder)
    with sharded_construction(ds_config, overrides=()) as context:
        network = empty_model(config, dtype)
    for buffer in network.buffers() if context else ():
        buffer.data = buffer.data.to(context.local_device)
    if init == "random":
        draw_weights(network, seed)
    else:
        load_weights(network, anatomy.folder)
    return network


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


def draw_weights(network, seed: int) -> None:
    """The family's own initialization, module by module, drawn on rank 0 so that it is the same on any number of
    ranks."""
    torch.manual_seed(seed)
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own:
            with writable(own):
                network._init_weights(module)


def writable(parameters):
    """Like `gathered`, and what rank 0 writes is what every rank keeps."""
    if not any(is_sharded(p) for p in parameters):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0)


def load_weights(network, folder: Path) -> None:
    """Fill `network` from the folder's safetensors; names are mapped as transformers maps them."""
    targets = dict(network.named_parameters(remove_duplicate=False))
    kept = network.state_dict()
    targets |= {name: buffer for name, buffer in network.named_buffers() if name in kept}
    owners = {}  # a tied tensor stands in the file under any of its names
    for name, tensor in targets.items():
        owners.setdefault(id(tensor), name)
    filled = set()
    rename = renamer(network, targets)
    for file in sorted(Path(folder).glob("*.safetensors")):
        filled |= load_file(file, targets, rename)
    done = {id(targets[name]) for name in filled}
    missing = [name for key, name in owners.items() if key not in done]
    if missing:
        raise UserError(
            f"{folder} must hold the weights its config.json describes, but {missing[0]} is missing ({len(missing)} in all)"
        )


def load_file(file: Path, targets: dict, rename=lambda name: name) -> set[str]:
    """Copy this rank's part of every known tensor of one file; returns the names that were filled."""
    filled = set()
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                name = rename(key)
                if name in targets:
                    fill(targets[name], tensors.get_slice(key), f"{file}: {key}")
                    filled.add(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} must be a whole safetensors file, but is not: {error}; copy it again") from None
    return filled


def renamer(network, targets):
    """Checkpoint key → parameter name: transformers' own renamings, and a missing or extra base-model prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [r for r in get_model_conversion_mapping(network) if isinstance(r, WeightRenaming)]
    prefix = f"{network.base_model_prefix}."

    def rename(key: str) -> str:
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        return next((k for k in (key, prefix + key, key.removeprefix(prefix)) if k in targets), key)

    return rename


@torch.no_grad()
def fill(parameter, source, what: str) -> None:
    """Write `source` (a safetensors slice) into a parameter: this rank's shard of it, or the whole where it is
    whole."""
    shape = tuple(source.get_shape())
    if shape != shape_of(parameter):
        raise UserError(
            f"{what} must have shape {shape_of(parameter)}, but has {shape}; the file belongs to another model"
        )
    if not is_sharded(parameter):
        parameter.data.copy_(source[:] if shape else source[...])
        return
    first, last = own_range(parameter)
    own_part(parameter, parameter.ds_tensor.data).copy_(flat_range(source, shape, first, last))


def own_range(parameter) -> tuple[int, int]:
    """The elements of the flattened tensor that this rank's shard holds."""
    size = parameter.ds_tensor.numel()
    first = min(torch.distributed.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return first, min(first + size, parameter.ds_numel)


def own_part(parameter, shard) -> torch.Tensor:
    """A shard (of the parameter, its gradient, its master) without what pads it: that is never set."""
    first, last = own_range(parameter)
    return shard.flatten()[: last - first]


def flat_range(source, shape, first: int, last: int) -> torch.Tensor:
    """Elements [first, last) of the flattened tensor, reading only the rows that hold them."""
    if not shape:
        return source[...].reshape(1)[first:last]
    row = max(1, torch.Size(shape[1:]).numel())
    start = first // row
    rows = source[start : -(-last // row)].reshape(-1)
    return rows[first - start * row : last - start * row]


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
