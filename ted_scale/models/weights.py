"""A network's weights: each rank's shard straight from safetensors, or random.

Transformers' own loader merges all files on rank 0 first. Here every rank reads only the rows that it keeps, so that the
peak of host memory is one rank's part of the model.
"""

import contextlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ted_scale.base.errors import UserError
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import empty_model, read_config
from ted_scale.models.zero import is_sharded, shape_of, shard_range, sharded_construction, without_padding


def build_network(anatomy: Anatomy, *, ds_config: dict | None, dtype, init: str = "weights", seed: int = 0):
    """The causal LM with its folder's weights or random ones; with `ds_config`, it is sharded while it is constructed."""
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


def draw_weights(network, seed: int) -> None:
    """The family's own initialization, module by module. Rank 0 draws the numbers, so that they do not depend on the number
    of ranks."""
    torch.manual_seed(seed)
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own:
            with writable(own):
                network._init_weights(module)


def writable(parameters):
    """Like `gathered`; afterwards every rank has the values that rank 0 wrote."""
    if not any(is_sharded(p) for p in parameters):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0)


def load_weights(network, folder: Path) -> None:
    """Fill `network` from the folder's safetensors; names are mapped as in transformers."""
    targets = dict(network.named_parameters(remove_duplicate=False))
    kept = network.state_dict()
    targets |= {name: buffer for name, buffer in network.named_buffers() if name in kept}
    owners = {}  # a tied tensor is in the file under any of its names
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
    """Copy this rank's part of every known tensor in one file; returns the names that were filled."""
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
    """Write `source` (a safetensors slice) into a parameter: this rank's shard, or all of a parameter that is not sharded."""
    shape = tuple(source.get_shape())
    if shape != shape_of(parameter):
        raise UserError(
            f"{what} must have shape {shape_of(parameter)}, but has {shape}; the file belongs to another model"
        )
    if not is_sharded(parameter):
        parameter.data.copy_(source[:] if shape else source[...])
        return
    first, last = shard_range(parameter)
    without_padding(parameter, parameter.ds_tensor.data).copy_(flat_range(source, shape, first, last))


def flat_range(source, shape, first: int, last: int) -> torch.Tensor:
    """Elements [first, last) of the flattened tensor, reading only the rows that hold them."""
    if not shape:
        return source[...].reshape(1)[first:last]
    row = max(1, torch.Size(shape[1:]).numel())
    start = first // row
    rows = source[start : -(-last // row)].reshape(-1)
    return rows[first - start * row : last - start * row]
