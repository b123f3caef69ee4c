"""Which rows and columns of each of the teacher's tensors the student keeps."""

from typing import NamedTuple

import torch

from ted_scale.base.errors import UserError
from ted_scale.commands.cutting.axes import Heads, Reader, input_dim
from ted_scale.commands.cutting.importance import Importance
from ted_scale.commands.cutting.sizes import Sizes
from ted_scale.models.anatomy import Anatomy


class Kept(NamedTuple):
    """Numbers in rising order; by block but for the hidden channels, which all blocks share."""

    hidden: torch.Tensor
    ffn: dict[int, torch.Tensor]
    heads: dict[int, torch.Tensor]
    groups: dict[int, torch.Tensor]


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.argsort(descending=True, stable=True)[:count].sort().values


def choose_channels(importance: Importance, own: Sizes, sizes: Sizes) -> Kept:
    heads = {k: choose_heads(values, own, sizes) for k, values in importance.heads.items()}
    return Kept(
        hidden=largest(importance.hidden, sizes.hidden),
        ffn={k: largest(values, sizes.ffn) for k, values in importance.ffn.items()},
        heads={k: chosen for k, (chosen, _) in heads.items()},
        groups={k: groups for k, (_, groups) in heads.items()},
    )


def choose_heads(values: torch.Tensor, own: Sizes, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """(query heads, key heads): the groups whose best query heads do the most, and these heads. Query head h reads key head
    h // (query heads a group), in the teacher and in the student."""
    group, each = own.heads // own.kv_heads, sizes.heads // sizes.kv_heads
    best = values.view(own.kv_heads, group).topk(each)
    groups = largest(best.values.sum(1), sizes.kv_heads)
    heads = (groups[:, None] * group + best.indices[groups]).flatten().sort().values
    return heads, groups


class Cutter(NamedTuple):
    """All that says how a tensor is cut."""

    anatomy: Anatomy
    own: Sizes
    sizes: Sizes
    kept: Kept
    heads: dict[str, tuple[int, Heads]]  # by the name of an attention module
    joined: dict[str, torch.Tensor]  # by the name of a projection: the FFN channel of each output (joined.py)

    def cuts(self, name: str, network, shape: tuple, target: tuple) -> dict[int, torch.Tensor]:
        """Of the teacher's tensor `name`: by dimension, what a tensor of shape `target` keeps of it."""
        differ = [d for d in range(len(shape)) if shape[d] != target[d]]
        return {d: self.cut(name, network, d, (shape[d], target[d])) for d in differ}

    def cut(self, name: str, network, dim: int, pair: tuple[int, int]) -> torch.Tensor:
        indices = self.of_heads(name, network, dim, pair)
        if indices is None:
            indices = self.of_joined(name, network, dim)
        if indices is None and pair == (self.own.hidden, self.sizes.hidden):
            indices = self.kept.hidden
        elif indices is None and pair == (self.own.ffn, self.sizes.ffn):
            indices = self.kept.ffn.get(self.block(name))
        if indices is None or len(indices) != pair[1]:
            raise UserError(
                f"TEACHER must have tensors whose channels are known to be cut in width, but {self.anatomy.family} has {name} "
                f"with {pair[0]} where the student has {pair[1]}; cut it in depth only"
            )
        return indices

    def block(self, name: str) -> int:
        number = name.removeprefix(f"{self.anatomy.blocks}.").partition(".")[0]
        return int(number) if number.isdigit() else -1

    def of_heads(self, name: str, network, dim: int, pair: tuple[int, int]) -> torch.Tensor | None:
        """Where a tensor of attention counts the channels of heads; None elsewhere."""
        owner = next((owner for owner in self.heads if name.startswith(f"{owner}.")), None)
        if owner is None:
            return None
        number, found = self.heads[owner]
        module = name.rpartition(".")[0]
        if module in found.before:
            return self.channels(number, found.before[module]) if dim == self.output_dim(name, network) else None
        if module == found.after:
            inner = name.endswith(".weight") and dim == input_dim(network.get_submodule(module))
            return self.found(number, pair[0]) if inner else None
        widths = {len(reader.query): reader for reader in found.before.values()}  # a norm over all heads
        return self.channels(number, widths[pair[0]]) if pair[0] in widths else None

    def of_joined(self, name: str, network, dim: int) -> torch.Tensor | None:
        """Where a tensor counts the outputs of a projection to several parts of an FFN; None elsewhere."""
        module = name.rpartition(".")[0]
        if module not in self.joined or dim != self.output_dim(name, network):
            return None
        return torch.isin(self.joined[module], self.kept.ffn[self.block(name)]).nonzero().flatten()

    def output_dim(self, name: str, network) -> int:
        """Of a projection's weight or bias."""
        return 0 if name.endswith(".bias") else 1 - input_dim(network.get_submodule(name.rpartition(".")[0]))

    def channels(self, number: int, reader: Reader) -> torch.Tensor:
        heads, groups = self.kept.heads[number], self.kept.groups[number]
        keeps = torch.isin(reader.query, heads) | torch.isin(reader.key, groups)
        return keeps.nonzero().flatten()

    def found(self, number: int, width: int) -> torch.Tensor:
        """The channels of what the heads found: head after head."""
        return torch.arange(width).view(self.own.heads, -1)[self.kept.heads[number]].flatten()
