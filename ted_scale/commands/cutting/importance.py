"""How much each head and channel of a teacher does on real text, from its forward alone.

A channel's importance is its mean |activation| over the tokens of a window, and of that the root of the sum of squares over the
windows (Minitron). FFN channels are measured where the last matrix of the FFN reads them, heads by the length of what they
found, hidden channels wherever a matrix reads them, after a norm. Only sums are kept, so the text may be of any length.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ted_scale.commands.cutting.axes import Heads, input_dim, is_matrix
from ted_scale.models.anatomy import Anatomy, run_body


class Importance(NamedTuple):
    hidden: torch.Tensor
    ffn: dict[int, torch.Tensor]  # by block
    heads: dict[int, torch.Tensor]


class Sums(dict):
    """By kind and block; None is the output head."""

    windows = 0  # of the batch that is read; opt joins windows and tokens into one dimension

    def add(self, key, states: torch.Tensor) -> None:
        by_token = states.float().abs().reshape(self.windows, -1, states.shape[-1])
        value = by_token.mean(1).square().sum(0).double().cpu()
        self[key] = self[key] + value if key in self else value


@torch.no_grad()
def measure(network, anatomy: Anatomy, batches: Iterable, heads: list[Heads], own, blocks: list[int]) -> Importance:
    """Of the blocks that the student gets. A hidden channel counts where they read it, and in the output head."""
    sums = Sums()
    handles = watch_channels(network, anatomy, heads, own, blocks, sums)
    try:
        for batch in batches:
            sums.windows = len(batch.tokens_BT)
            last = run_body(network, anatomy, batch.tokens_BT, batch.packing)
            if last.shape[-1] == anatomy.width:
                sums.add(("hidden", None), last)
    finally:
        for handle in handles:
            handle.remove()
    read = [values.sqrt() for (kind, _), values in sums.items() if kind == "hidden"]
    each = {kind: {k: sums[kind, k].sqrt() for k in blocks if (kind, k) in sums} for kind in ("ffn", "heads")}
    return Importance(sum(read), each["ffn"], each["heads"])


def watch_channels(network, anatomy: Anatomy, heads: list[Heads], own, blocks: list[int], sums: Sums) -> list:
    handles, after = [], {found.after for found in heads}
    for number in blocks:
        prefix = f"{anatomy.blocks}.{number}"
        for name, module in network.get_submodule(prefix).named_modules(prefix=prefix):
            if not is_matrix(module):
                continue
            kind = {own.ffn: "ffn", own.hidden: "hidden"}.get(module.weight.shape[input_dim(module)])
            if name in after:
                kind = "heads"
            if kind:
                watch = watch_input(sums, (kind, number), own.heads if kind == "heads" else None)
                handles.append(module.register_forward_pre_hook(watch))
    return handles


def watch_input(sums: Sums, key, heads: int | None):
    def watch(module, args):
        sums.add(key, args[0].unflatten(-1, (heads, -1)).float().norm(dim=-1) if heads else args[0])

    return watch
