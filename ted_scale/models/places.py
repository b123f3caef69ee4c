"""Where a tensor of a model's files belongs in the network: the name of the network's tensor, and the part of it.

transformers knows how names in a family's files are mapped and how tensors are merged. Note: files have a mixture's experts one
by one. The network has all experts of a block in one tensor [experts, rows, ...], in which each matrix of the files is one
stretch. So they are read by rows like all others, and never merged in memory. Other changes that transformers makes at loading
(splits, transposes, joins) are not supported here, and such tensors count as missing.
"""

import re
from typing import NamedTuple

LONGEST = 6  # digits of an expert's number


class Place(NamedTuple):
    """A whole tensor of the network, or a part of one expert in it: the expert's rows are cut into `parts`, and this is part
    `part`."""

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def within(self, whole: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """(shape of the place, its start in the flattened tensor), for a network's tensor of shape `whole`. An expert that does
        not exist has the shape ()."""
        if self.expert is None:
            return whole, 0
        experts, rows, *rest = whole
        shape = (rows // self.parts, *rest) if self.expert < experts else ()
        size = rows // self.parts
        for side in rest:
            size *= side
        return shape, (self.expert * self.parts + self.part) * size


def placer(network, targets):
    """A function from a key in a file to a Place in `targets`. It follows transformers' renamings and merging of experts, and
    adds or removes the prefix of the base model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    transforms = get_model_conversion_mapping(network)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    merges = [t for t in transforms if merges_experts(t)]
    prefix = f"{network.base_model_prefix}."

    def place(key: str) -> Place:
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        at = next((at for merge in merges if (at := merged(merge, key))), Place(key))
        names = at.name, prefix + at.name, at.name.removeprefix(prefix)
        return at._replace(name=next((name for name in names if name in targets), key))

    return place


def merges_experts(transform) -> bool:
    """Whether a transform stacks experts, after it has joined the rows of each expert's matrices."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), getattr(step, "dim", None)) for step in getattr(transform, "operations", ())]
    return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def merged(merge, key: str) -> Place | None:
    """The place of one expert's matrix in a file. None if `key` is no such matrix."""
    name, pattern = merge.rename_source_key(key)
    found = re.search(pattern.replace("*", rf"([0-9]{{1,{LONGEST}}})"), key) if pattern else None
    if found is None:
        return None
    return Place(name, int(found[1]), merge.source_patterns.index(pattern), len(merge.source_patterns))
