"""Where a tensor of a model's files belongs in the network: under which name, and in which part of it.

transformers knows the names of a family's files and how it merges what they hold. Note: files have a mixture's experts one by one,
and the network has all of a block in one tensor [experts, rows, ...], where each matrix of the files is one stretch. So they are
read by rows like all others, and never merged in memory. What transformers splits, turns or joins in other ways while it loads is
not known here, and is missing then.
"""

import re
from typing import NamedTuple

LONGEST = 6  # digits of an expert's number


class Place(NamedTuple):
    """All of a network's tensor, or of one expert in it part `part` of `parts` with as many rows."""

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def within(self, whole: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """(shape, where it begins in the flattened tensor) in a network's tensor of shape `whole`. An expert that is not there has
        no sides."""
        if self.expert is None:
            return whole, 0
        experts, rows, *rest = whole
        shape = (rows // self.parts, *rest) if self.expert < experts else ()
        size = rows // self.parts
        for side in rest:
            size *= side
        return shape, (self.expert * self.parts + self.part) * size


def placer(network, targets):
    """Key in a file → Place in `targets`: transformers' own renamings, its merging of experts, and a missing or extra base-model
    prefix."""
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
    """Whether it stacks experts, and before that joins the rows of each one's matrices."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), getattr(step, "dim", None)) for step in getattr(transform, "operations", ())]
    return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def merged(merge, key: str) -> Place | None:
    """The place of a file's matrix of one expert."""
    name, pattern = merge.rename_source_key(key)
    found = re.search(pattern.replace("*", rf"([0-9]{{1,{LONGEST}}})"), key) if pattern else None
    if found is None:
        return None
    return Place(name, int(found[1]), merge.source_patterns.index(pattern), len(merge.source_patterns))
