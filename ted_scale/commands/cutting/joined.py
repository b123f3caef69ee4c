"""Projections to several parts of an FFN at once, as phi3's and glm's to gate and up: the FFN channel that each output is for.

It is found by a trial, as heads are (axes.py): the outputs become leaves of a graph, with a row for each bit of a channel's number,
and one for each bit that is not set. What the last matrix of the FFN reads then has slopes that spell the number.
"""

import torch

from ted_scale.commands.cutting.axes import Heads, input_dim, is_matrix
from ted_scale.models.anatomy import Anatomy, run_body


def find_joined(network, anatomy: Anatomy, heads: list[Heads], ffn: int) -> dict[str, torch.Tensor]:
    """By module: for each output the number of its channel, or -1 if it is for none or for several."""
    bits = max(1, (ffn - 1).bit_length())
    is_set = (torch.arange(ffn) >> torch.arange(bits)[:, None]) & 1
    masks = torch.cat([is_set, 1 - is_set])
    leaves, reads = trial(network, anatomy, {found.name for found in heads}, ffn, len(masks))
    found = {}
    for name, (block, leaf) in leaves.items():
        read = reads[block].flatten(0, -2) if block in reads else None
        if read is None or not read.requires_grad:  # nothing of the FFN comes from such an output
            continue
        slope = slope_of((read * masks.to(read)).sum(), leaf)
        spelled, not_set = slope.flatten(0, -2).ne(0).cpu().split(bits)
        number = (spelled.int() << torch.arange(bits)[:, None]).sum(0)
        channels = torch.where((spelled ^ not_set).all(0), number, -1)
        if (channels >= 0).any():
            found[name] = channels
    return found


def slope_of(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    (slope,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope


def trial(network, anatomy: Anatomy, attention: set[str], ffn: int, rows: int):
    """One token in so many rows. (of each joined projection its block and the leaf in the place of its outputs, by block what the
    last matrix of the FFN reads)"""
    leaves: dict[str, tuple[int, torch.Tensor]] = {}
    reads: dict[int, torch.Tensor] = {}

    def joins(name: str, number: int):
        def hook(module, inputs, output):
            leaves[name] = number, torch.ones_like(output, requires_grad=True)
            return leaves[name][1]

        return hook

    handles = []
    for number in range(anatomy.layers):
        prefix = f"{anatomy.blocks}.{number}"
        for name, module in network.get_submodule(prefix).named_modules(prefix=prefix):
            if not is_matrix(module) or any(name.startswith(f"{owner}.") for owner in attention):
                continue
            width_in, width_out = (module.weight.shape[d] for d in (input_dim(module), 1 - input_dim(module)))
            if width_in != ffn and width_out > ffn and width_out % ffn == 0:
                handles.append(module.register_forward_hook(joins(name, number)))
            if width_in == ffn:
                handles.append(module.register_forward_pre_hook(lambda m, args, n=number: reads.update({n: args[0]})))
    try:
        device = network.get_input_embeddings().weight.device
        with torch.enable_grad():
            run_body(network, anatomy, torch.zeros(rows, 1, dtype=torch.long, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return leaves, reads
