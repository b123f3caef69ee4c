"""The trained state as files: one safetensors file a rank, which holds that rank's piece of every tensor, and reading any
stretch of any tensor from them, by whatever number of ranks.

ZeRO-3 cuts every tensor, flattened, into equal pieces. A file holds the pieces as they were cut, without the last one's
padding; a reader on other ranks takes the stretches it needs from the files that have them. Which tensors there are, and
their shapes, the manifest says (sealed.py). The surprise: a piece that is all padding is not in its file.
"""

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import fits, is_count
from ted_scale.base.sealed import MANIFEST

KINDS = ("fp32", "exp_avg", "exp_avg_sq")  # the master weight and AdamW's moments, all in fp32
BYTES = 4


def key_of(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def cut(numel: int, ranks: int, rank: int) -> tuple[int, int]:
    """The stretch [first, last) of a flattened tensor that `rank` of `ranks` holds."""
    piece = -(-numel // ranks)
    return min(rank * piece, numel), min((rank + 1) * piece, numel)


def as_bytes(tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None) -> Iterable:
    """A safetensors file of fp32 tensors in host memory, piece by piece, without a copy of them."""
    header: dict[str, dict] = {"__metadata__": about} if about else {}
    end = 0
    for key, tensor in tensors.items():
        first, end = end, end + BYTES * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            yield memoryview(tensor.flatten().numpy())


def sound(manifest: dict) -> bool:
    shapes = manifest["shapes"].values()
    sizes = [math.prod(shape) if isinstance(shape, list) and all(map(is_count, shape)) else 0 for shape in shapes]
    return manifest["ranks"] > 0 and all(size > 0 and is_count(size) for size in sizes)


class State:
    """A checkpoint's tensors, memory-mapped; each file is opened when it is first needed."""

    def __init__(self, checkpoint: Path, manifest: dict):
        if not fits(manifest, {"ranks": int, "updates": int, "shapes": dict}) or not sound(manifest):
            raise UserError(f"{checkpoint / MANIFEST} must say ranks, updates and shapes, but does not; copy it again")
        self.checkpoint, self.ranks, self.shapes = checkpoint, manifest["ranks"], manifest["shapes"]
        self.opened = lru_cache(maxsize=64)(lambda rank: safe_open(checkpoint / rank_file(rank), framework="pt"))

    def stretch(self, kind: str, name: str, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a flattened tensor."""
        numel = torch.Size(self.shapes[name]).numel()
        parts, each = [], max(1, -(-numel // self.ranks))
        for rank in range(first // each, -(-last // each)):
            begin, end = cut(numel, self.ranks, rank)
            part = self.read(rank, key_of(kind, name))
            parts.append(part[max(first, begin) - begin : min(last, end) - begin])
        found = torch.cat(parts) if len(parts) != 1 else parts[0]
        if len(found) != last - first:
            raise UserError(
                f"{self.checkpoint} must hold {numel} numbers of {kind} of {name}, but does not; copy it again"
            )
        return found

    def read(self, rank: int, key: str):
        try:
            return self.opened(rank).get_slice(key)
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.checkpoint / rank_file(rank)} must hold {key}, but does not ({reason}); copy it again"
            ) from None

    def whole(self, name: str, kind: str = "fp32") -> torch.Tensor:
        shape = torch.Size(self.shapes[name])
        return self.stretch(kind, name, 0, shape.numel()).view(shape)
