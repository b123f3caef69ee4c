"""A student of some of a teacher's blocks: python tools/cut_student.py TEACHER OUT --layers N [--keep 0,2,5]

Keeps embeddings, tail and head, and by default the first and the last block, with the others spread evenly between. OUT/cut.json
records which blocks they were; a run uses it to match them with its teacher's. Tensors are copied one shard at a time. Note:
every per-layer list of the config is written out and cut, also a list that the teacher's config.json leaves to a default.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.distill.pairs import CUT, cut_map, spread
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import empty_model, inspect, read_config
from ted_scale.models.model_folder import (
    TOKENIZER_FILES,
    Recipe,
    copy_files,
    new_folder,
    saved_tensors,
    write_json,
    write_shards,
)
from ted_scale.models.weights import renamer
from ted_scale.storage import tensor_file
from ted_scale.storage.hub import find_folder
from ted_scale.storage.tensor_file import Entry, Stretch

NO_LAYERS = ("architectures", "id2label", "label2id")  # their length may equal the depth by chance


def choose_blocks(layers: int, count: int | None, keep: str | None) -> list[int]:
    """Which of the teacher's blocks the student gets, in order."""
    if keep is not None:
        return parse_keep(layers, count, keep)
    if count is None or not 1 <= count <= layers:
        raise UserError(f"--layers must be 1 to {layers}, the teacher's blocks, but is {count}; or list them by --keep")
    return spread(count, layers)


def parse_keep(layers: int, count: int | None, keep: str) -> list[int]:
    try:
        blocks = [int(part) for part in keep.split(",")]
    except ValueError:
        raise UserError(f"--keep must list block numbers like 0,2,5, but is '{keep}'") from None
    if any(not 0 <= b < layers for b in blocks) or blocks != sorted(set(blocks)):
        raise UserError(f"--keep must list blocks 0 to {layers - 1} in rising order, each once, but is '{keep}'")
    if count not in (None, len(blocks)):
        raise UserError(f"--layers must be how many blocks --keep lists ({len(blocks)}), but is {count}; leave it out")
    return blocks


def cut_config(folder: Path, blocks: list[int]) -> dict:
    """The teacher's config.json with fewer layers; keys that a class renames (gpt2's n_layer) keep their name."""
    config = read_config("TEACHER", folder)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"TEACHER must compute a block alike at any depth, but {folder} sets scale_attn_by_inverse_layer_idx"
        )
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in config.to_dict().items():
        per_layer = isinstance(value, list) and len(value) == config.num_hidden_layers
        if per_layer and key not in NO_LAYERS and "token" not in key:
            values[key] = [value[b] for b in blocks]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(blocks)
    return values


class Place(NamedTuple):
    """Where a tensor of the teacher is read."""

    file: Path
    key: str
    entry: Entry


def find_tensors(anatomy: Anatomy) -> dict[str, Place]:
    """By name in the teacher. A tied tensor has its first name, whatever its file calls it."""
    with torch.device("meta"):
        model = empty_model(read_config("TEACHER", anatomy.folder))
    targets = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in saved_tensors(model).items()}
    rename, places = renamer(model, targets), {}
    for file in sorted(anatomy.folder.glob("*.safetensors")):
        for key, entry in tensor_file.header_of(file).entries.items():
            name = rename(key)
            if name in targets:
                places.setdefault(first[id(targets[name])], Place(file, key, entry))
    return places


def places_of(teacher: Anatomy, student: Path, blocks: list[int]) -> dict[str, Place]:
    """By name in the student: the tensors of the blocks under their new numbers, and those outside of blocks."""
    with torch.device("meta"):
        model = empty_model(read_config("OUT", student))
    found, places = find_tensors(teacher), {}
    for name, target in saved_tensors(model).items():
        place = found.get(name_in_teacher(name, teacher.blocks, blocks))
        if place is None:
            raise UserError(
                f"TEACHER must hold the weights its config.json describes, but {teacher.folder} has none for {name}"
            )
        if place.entry.shape != target.shape:
            raise UserError(
                f"{place.file}: {place.key} must have shape {tuple(target.shape)}, but has {place.entry.shape}; the file "
                "belongs to another model"
            )
        places[name] = place
    return places


def name_in_teacher(name: str, prefix: str, blocks: list[int]) -> str:
    if not name.startswith(f"{prefix}."):
        return name
    number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{blocks[int(number)]}.{rest}"


def read(places: dict[str, Place], tensors: dict[str, torch.Tensor]) -> None:
    """Fill the tensors of an output shard, which opens each file of the teacher once."""
    for file in sorted({places[name].file for name in tensors}):
        here = [Stretch(places[name].key, 0, t.view(-1)) for name, t in tensors.items() if places[name].file == file]
        tensor_file.fill(file, lambda entries, here=here: here)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", metavar="TEACHER", help="model folder or hub id")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="the student's blocks, spread from the first to the last"
    )
    parser.add_argument("--keep", metavar="0,2,5", help="the teacher's blocks to keep, from 0")
    parser.add_argument("--max-shard-gb", type=float, default=5, help="largest file, in GB")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    folder = find_folder("TEACHER", arguments.teacher)
    teacher = inspect("TEACHER", str(folder))
    blocks = choose_blocks(teacher.layers, arguments.layers, arguments.keep)
    with new_folder(arguments.out, overwrite=arguments.overwrite, sources=[folder]) as part:
        write_json(part / "config.json", cut_config(folder, blocks))
        student = inspect("a cut of TEACHER", str(part), needs_weights=False)
        places = places_of(teacher, part, blocks)
        recipes = [Recipe(name, place.entry.shape, place.entry.dtype) for name, place in places.items()]
        size = write_shards(part, recipes, partial(read, places), arguments.max_shard_gb * 1e9)
        copy_files(folder, part, [*TOKENIZER_FILES, "generation_config.json"])
        write_json(part / CUT, cut_map(teacher, blocks))
    print(f"blocks {', '.join(map(str, blocks))} of {teacher.layers} of {folder} -> {arguments.out}")
    print(f"{student.parameters / 1e6:,.2f} M parameters, {size / 1e6:,.1f} MB; train it with:")
    print(f"  student.path = {json.dumps(str(arguments.out))}")


if __name__ == "__main__":
    run_main(main)
