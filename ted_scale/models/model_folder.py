"""Write a Hugging Face model folder: safetensors shards, one after another, and the small files beside them.

The caller describes each tensor. When a shard is written, the caller reads its tensors into memory. So only one shard is in
memory. Everything is written to OUT.part, which is renamed to OUT when it is complete.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ted_scale.base.durable import PART, publish, sync
from ted_scale.base.errors import UserError
from ted_scale.storage.hub import check_text

TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer*.model", "*.spm", "spiece.model", "sentencepiece*.model", "*.tiktoken", "vocab.json",
    "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip


class Recipe(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def saved_tensors(model) -> dict[str, torch.Tensor]:
    """Name → parameter or buffer, as in a model's files. A tied tensor is there once, under its first name."""
    first = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool, sources: Iterable[Path] = ()):
    """A folder to fill. It is renamed to `out` at the end, or deleted after an error."""
    out = Path(out).resolve()
    check_out(out, overwrite, sources)
    part = out.with_name(out.name + PART)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in part.rglob("*"):
            sync(path)
        sync(part)
        publish(part)
    except OSError as error:
        raise UserError(
            f"{out} must be where this user can write and has room, but is not: {error}; choose another folder"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_out(out: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Refuse an OUT that must not be replaced, or that holds one of the `sources`. Call this before hours of work."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not overwrite:
        raise UserError(f"OUT must be a new or an empty folder, but {out} is not; choose another or pass --overwrite")
    if not (out / "config.json").is_file():
        raise UserError(f"--overwrite must replace a model folder, but {out} has no config.json; choose another OUT")
    lost = next((s for s in sources if Path(s).resolve().is_relative_to(out)), None)
    if lost:
        raise UserError(f"OUT must not hold what is read, but {lost} is in {out}; choose another OUT")


def write_shards(folder: Path, recipes: Iterable[Recipe], read: Callable[[dict], None], limit: float) -> int:
    """Write the tensors and their index. A file has at most `limit` bytes, or one tensor. `read` fills a shard's tensors, by
    name. Returns the size of all tensors."""
    shards = split(recipes, limit)
    places = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, shard, read)
        places |= {recipe.name: name for recipe in shard}
    size = sum(recipe.size for shard in shards for recipe in shard)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})
    return size


def split(recipes: Iterable[Recipe], limit: float) -> list[list[Recipe]]:
    shards, filled = [[]], 0
    for recipe in recipes:
        if shards[-1] and filled + recipe.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(recipe)
        filled += recipe.size
    return shards


def write_shard(path: Path, shard: list[Recipe], read: Callable[[dict], None]) -> None:
    tensors = {recipe.name: torch.empty(recipe.shape, dtype=recipe.dtype) for recipe in shard}
    read(tensors)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(0o644)  # safetensors lets only the owner read it


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_link(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of the model. A downloaded folder may hold a link to a private file of this user, and a copy
    would publish that file. The hub's snapshots are links, too, but into the folder above them."""
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    if not path.resolve().is_relative_to(root):
        raise UserError(
            f"{path} must be in its own folder to be copied, but is a link out of it; put the file there itself"
        )


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> int:
    """Copy the files that match `patterns`; returns their number."""
    source = Path(source)
    found = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    for path in found:
        check_link(source, path)
        check_text(f"{source} must be a model folder", path)
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    return len(found)
