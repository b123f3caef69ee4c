"""A network's weights: each rank reads its shard from safetensors, or the weights are random.

Transformers' own loader first merges all files on rank 0. Here every rank reads only the rows that it keeps, so the peak of host
memory is one rank's part of the model. If it keeps a model whole, it reads all rows.
"""

import contextlib
import math
from pathlib import Path

import torch

from ted_scale.base.errors import UserError, files_at
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import empty_model, read_config
from ted_scale.models.places import Place, placer
from ted_scale.models.zero import (
    bare_construction,
    is_sharded,
    shape_of,
    shard_range,
    sharded_construction,
    without_padding,
)
from ted_scale.storage import tensor_file
from ted_scale.storage.tensor_file import Stretch


def build_network(
    anatomy: Anatomy, *, ds_config: dict | None, dtype, init: str = "weights", seed: int = 0, group=None, device="cpu"
):
    """The causal LM with its folder's weights or random ones. With `ds_config` it is sharded over `group` (None: all ranks) while
    it is constructed. Else it is whole on `device`."""
    config = read_config("model", anatomy.folder)
    with sharded_construction(ds_config, (), group) if ds_config else bare_construction(device) as home:
        network = empty_model(config, dtype)
    for tensor in (*network.buffers(), *(p for p in network.parameters() if not is_sharded(p))):
        tensor.data = tensor.data.to(home)  # a tensor that is there is not copied
    if init == "random":
        torch.manual_seed(seed)
        draw_weights(network, network.modules())
    else:
        load_weights(network, anatomy.folder)
    return network


def draw_weights(network, modules) -> None:
    """Initialize `modules` one by one with the family's own code. Rank 0 draws the numbers, so they do not depend on the number
    of ranks."""
    for module in modules:
        own = list(module.parameters(recurse=False))
        if own:
            with writable(own):
                network._init_weights(module)


def writable(parameters):
    """Like `gathered`, but afterwards every rank has the values that rank 0 wrote."""
    if not any(is_sharded(p) for p in parameters):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0)


def tensors_of(module, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a module that model files contain: parameters and persistent buffers, under all names. `name` is the
    module's name in its network."""
    prefix = f"{name}." if name else ""
    kept = module.state_dict(prefix=prefix)
    buffers = {key: buffer for key, buffer in module.named_buffers(name) if key in kept}
    return dict(module.named_parameters(name, remove_duplicate=False)) | buffers


def load_weights(network, folder: Path, part: dict | None = None) -> None:
    """Fill `network`, or only a part of its tensors, from the folder's safetensors. Names are mapped as in transformers."""
    every = tensors_of(network)
    targets, place = every if part is None else part, placer(network, every)
    owners = {}  # a tied tensor is in the file under any of its names
    for name, tensor in targets.items():
        owners.setdefault(id(tensor), name)
    filled: dict[int, set[Place]] = {key: set() for key in owners}
    with files_at(folder):
        found = sorted(Path(folder).glob("*.safetensors"))
    for file in found:
        for at in load_file(file, targets, place):
            filled[id(targets[at.name])].add(at)
    missing = [name for key, name in owners.items() if not is_complete(targets[name], filled[key])]
    if missing:
        raise UserError(
            f"{folder} must hold the weights its config.json describes, but {missing[0]} is missing ({len(missing)} in all)"
        )


def is_complete(tensor, places: set[Place]) -> bool:
    return any(at.expert is None or len(places) == shape_of(tensor)[0] * at.parts for at in places)


def load_file(file: Path, targets: dict, place=Place) -> set[Place]:
    """Read this rank's part of every known tensor in one file. Returns the places that were filled."""
    filled = set()

    def choose(entries):
        places = {key: at for key in entries if (at := place(key)).name in targets}
        filled.update(places.values())
        return [own_part(key, at, targets[at.name], entries[key].shape, f"{file}: {key}") for key, at in places.items()]

    tensor_file.fill(file, choose)
    return filled


def own_part(key: str, at: Place, parameter, shape: tuple[int, ...], what: str) -> Stretch:
    """The stretch of a file's tensor of `shape` that a parameter needs: this rank's shard, or all of it if it is not sharded."""
    wanted, begin = at.within(shape_of(parameter))
    if shape != wanted:
        raise UserError(f"{what} must have shape {wanted}, but has {shape}; the file belongs to another model")
    if is_sharded(parameter):
        mine, first = without_padding(parameter, parameter.ds_tensor.data), shard_range(parameter)[0]
    else:
        parameter.data = parameter.data.contiguous()
        mine, first = parameter.data.view(-1), 0
    low, high = max(begin, first), min(begin + math.prod(shape), first + len(mine))
    return Stretch(key, low - begin, mine[low - first : high - first]) if low < high else Stretch(key, 0, mine[:0])
