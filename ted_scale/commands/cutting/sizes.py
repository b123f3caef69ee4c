"""The student's sizes: what is asked for, whether a teacher can be cut to it, and how config.json says it.

A head keeps its width, because positions are turned into angles by the channels of a head. So heads and hidden channels can be
chosen apart only in families whose config may name the head's width; in others a hidden width is heads times that width.
"""

import argparse
import json
from typing import NamedTuple

from ted_scale.base.errors import UserError
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import read_config

FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner")
NO_LAYERS = ("architectures", "id2label", "label2id")  # their length may equal the depth by chance


class Sizes(NamedTuple):
    hidden: int
    ffn: int
    heads: int
    kv_heads: int


OPTIONS = {name: f"--{name.replace('_', '-')}" for name in Sizes._fields}


def asked_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    """Those that the command line names."""
    return {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}


def student_sizes(teacher: Anatomy, asked: dict[str, int]) -> Sizes:
    """What is not asked for stays, except for the other side of a group: key heads and their query heads go together."""
    own = teacher_sizes(teacher)
    for name, value in asked.items():
        if not 1 <= value <= getattr(own, name):
            raise UserError(f"{OPTIONS[name]} must be 1 to {getattr(own, name)}, the teacher's, but is {value}")
    sizes = own._replace(**asked)
    group = own.heads // own.kv_heads
    if "heads" not in asked:
        sizes = sizes._replace(heads=sizes.kv_heads * group)
    elif "kv_heads" not in asked and group == 1:
        sizes = sizes._replace(kv_heads=sizes.heads)
    refuse_unequal_groups(sizes, group)
    refuse_unfit_hidden(teacher, own, sizes)
    return sizes


def refuse_unequal_groups(sizes: Sizes, group: int) -> None:
    each, rest = divmod(sizes.heads, sizes.kv_heads)
    if rest or each > group:
        raise UserError(
            f"--heads must be 1 to {group} for each of the {sizes.kv_heads} key heads, the same for all, but is "
            f"{sizes.heads}; change --heads or --kv-heads"
        )


def refuse_unfit_hidden(teacher: Anatomy, own: Sizes, sizes: Sizes) -> None:
    if sizes.hidden % sizes.heads and not own.hidden % own.heads:
        raise UserError(f"--hidden must be a multiple of the heads ({sizes.heads}), but is {sizes.hidden}")
    if sizes.ffn != own.ffn and own.ffn == own.hidden:
        raise UserError(
            f"--ffn must be left out for {teacher.folder}, whose FFN is as wide as its states ({own.ffn}), but is {sizes.ffn}"
        )


def teacher_sizes(teacher: Anatomy) -> Sizes:
    config = read_config("TEACHER", teacher.folder)
    heads, hidden = config.num_attention_heads, config.hidden_size
    key = ffn_key(config)
    ffn = getattr(config, key) or 4 * hidden  # None is gpt2's default
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not all(isinstance(size, int) for size in (hidden, ffn, heads, kv_heads)) or head_width(teacher) is None:
        raise UserError(f"TEACHER must have blocks of one width to be cut in width, but {teacher.folder} has several")
    return Sizes(hidden, ffn, heads, kv_heads)


def ffn_key(config) -> str:
    key = next((key for key in FFN_KEYS if hasattr(config, key)), None)
    if key is None:
        raise UserError(
            f"TEACHER must name its FFN's width to be cut in width, but {config.model_type} does not; cut it in depth only"
        )
    return key


def head_width(anatomy: Anatomy) -> int | None:
    widths = {width for layer in anatomy.attention for width in (layer.width, layer.value_width)}
    return widths.pop() if len(widths) == 1 else None


def cut_config(teacher: Anatomy, blocks: list[int], sizes: Sizes | None) -> dict:
    """The teacher's config.json with the student's sizes; keys that a class renames (gpt2's n_layer) keep their name."""
    config, folder = read_config("TEACHER", teacher.folder), teacher.folder
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"TEACHER must compute a block alike at any depth, but {folder} sets scale_attn_by_inverse_layer_idx"
        )
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in config.to_dict().items():
        per_layer = isinstance(value, list) and len(value) == config.num_hidden_layers
        if per_layer and key not in NO_LAYERS and "token" not in key:
            values[key] = [value[b] for b in blocks]
    values[name_of(config, "num_hidden_layers")] = len(blocks)
    return values if sizes is None else values | width_values(config, teacher, sizes)


def name_of(config, key: str) -> str:
    return config.attribute_map.get(key, key)


def width_values(config, teacher: Anatomy, sizes: Sizes) -> dict:
    """Every size is written, also one that the teacher's config.json leaves to a default, which follows other sizes."""
    values = {
        name_of(config, "hidden_size"): sizes.hidden,
        name_of(config, "num_attention_heads"): sizes.heads,
        ffn_key(config): sizes.ffn,
    }
    if hasattr(config, "num_key_value_heads"):
        values["num_key_value_heads"] = sizes.kv_heads
    if hasattr(config, "head_dim") or sizes.hidden != sizes.heads * head_width(teacher):
        values["head_dim"] = head_width(teacher)
    if getattr(config, "word_embed_proj_dim", None) == config.hidden_size:  # opt: embeddings as wide as the states
        values["word_embed_proj_dim"] = sizes.hidden
    return values


def refuse_other_heads(teacher: Anatomy, student: Anatomy | None, sizes: Sizes) -> None:
    """None is a student that cannot compute, because its heads should have another width than hidden width by heads."""
    if student is None or head_width(student) != head_width(teacher):
        raise UserError(
            f"--hidden must be {head_width(teacher)} times the heads in {teacher.family}, whose config cannot name a head's "
            f"width, but is {sizes.hidden} with {sizes.heads} heads; ask for --hidden "
            f"{sizes.heads * head_width(teacher)}, or for other --heads"
        )
