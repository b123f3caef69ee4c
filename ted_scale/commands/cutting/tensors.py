"""The teacher's tensors: where each is in its files, and what of it the student gets, read one tensor at a time."""

from pathlib import Path
from typing import NamedTuple

import torch

from ted_scale.base.errors import UserError
from ted_scale.commands.cutting.channels import Cutter
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import empty_model, read_config
from ted_scale.models.model_folder import saved_tensors
from ted_scale.models.places import placer
from ted_scale.storage import tensor_file
from ted_scale.storage.tensor_file import Entry, Stretch


class Place(NamedTuple):
    """Where a tensor of the teacher is read, and by dimension the rows or columns that are kept of it."""

    file: Path
    key: str
    entry: Entry
    cuts: dict[int, torch.Tensor]
    shape: tuple[int, ...]  # in the student


def find_tensors(folder: Path, model) -> dict[str, tuple[Path, str, Entry]]:
    """By name in the teacher. A tied tensor has its first name, whatever its file calls it."""
    targets = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in saved_tensors(model).items()}
    place, found = placer(model, targets), {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, entry in tensor_file.header_of(file).entries.items():
            name = place(key).name
            if name in targets:
                found.setdefault(first[id(targets[name])], (file, key, entry))
    return found


def places_of(teacher: Anatomy, student: Path, blocks: list[int], cutter: Cutter | None) -> dict[str, Place]:
    """By name in the student: the tensors of the blocks under their new numbers, and those outside of blocks."""
    with torch.device("meta"):
        whole = empty_model(read_config("TEACHER", teacher.folder))
        model = empty_model(read_config("OUT", student))
    found, shapes = find_tensors(teacher.folder, whole), {n: tuple(t.shape) for n, t in whole.state_dict().items()}
    places = {}
    for name, target in saved_tensors(model).items():
        origin = name_in_teacher(name, teacher.blocks, blocks)
        if origin not in found:
            raise UserError(
                f"TEACHER must hold the weights its config.json describes, but {teacher.folder} has none for {name}"
            )
        file, key, entry = found[origin]
        if entry.shape != shapes[origin]:
            raise UserError(
                f"{file}: {key} must have shape {shapes[origin]}, but has {entry.shape}; the file belongs to another model"
            )
        cuts = cutter.cuts(origin, whole, entry.shape, target.shape) if cutter else {}
        places[name] = Place(file, key, entry, cuts, tuple(target.shape))
    refuse_lost(teacher, whole, model, blocks)
    return places


def refuse_lost(teacher: Anatomy, whole, model, blocks: list[int]) -> None:
    """A family may leave a part out at some sizes, as opt its projection of embeddings that are as wide as its states."""
    kept = {name_in_teacher(name, teacher.blocks, blocks) for name in model.state_dict()}
    taken = tuple(f"{teacher.blocks}.{number}." for number in set(range(teacher.layers)) - set(blocks))
    lost = next((name for name in whole.state_dict() if name not in kept and not name.startswith(taken)), None)
    if lost:
        raise UserError(
            f"the student must have each part of its teacher, but {teacher.family} has no {lost} at this size; choose another"
        )


def name_in_teacher(name: str, prefix: str, blocks: list[int]) -> str:
    if not name.startswith(f"{prefix}."):
        return name
    number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{blocks[int(number)]}.{rest}"


def read(
    places: dict[str, Place], tensors: dict[str, torch.Tensor], fitted: dict[str, torch.Tensor] | None = None
) -> None:
    """Fill the tensors of an output shard: fitted ones as they are, whole ones of a file at once, cut ones by themselves."""
    fitted = fitted or {}
    for name in tensors.keys() & fitted.keys():
        tensors[name].copy_(fitted[name])
    tensors = {name: tensor for name, tensor in tensors.items() if name not in fitted}
    for file in sorted({places[name].file for name in tensors}):
        here = {name: t for name, t in tensors.items() if places[name].file == file}
        read_whole(file, [Stretch(places[n].key, 0, t.view(-1)) for n, t in here.items() if not places[n].cuts])
        for name, tensor in here.items():
            if places[name].cuts:
                tensor.copy_(read_cut(places[name]))


def read_whole(file: Path, stretches: list[Stretch]) -> None:
    tensor_file.fill(file, lambda entries: stretches)


def read_cut(place: Place) -> torch.Tensor:
    whole = torch.empty(place.entry.shape, dtype=place.entry.dtype)
    tensor_file.fill(place.file, lambda entries: [Stretch(place.key, 0, whole.view(-1))])
    for dim, kept in place.cuts.items():
        whole = whole.index_select(dim, kept)
    return whole
