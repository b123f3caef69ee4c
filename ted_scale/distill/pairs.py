"""Which blocks of student and teacher are matched: as listed, as the student was cut, or by a rule.

tools/cut_student.py leaves a map in the student's folder (CUT): which of its teacher's blocks each of its own was. It is the
default beside a teacher of that shape, the one it was cut from or one tuned further. The surprise: the rule for students that
were not cut is another one than the cut's. It is the method's own, and matches no first block.
"""

from pathlib import Path
from typing import NamedTuple

from ted_scale.base.errors import UserError, files_at, shown
from ted_scale.base.parsing import fits, parse_json
from ted_scale.config.method import Pairs
from ted_scale.models.anatomy import Anatomy

CUT = "cut.json"
FORM = {"blocks": list, "teacher": dict}
SAME = ("family", "layers", "width", "vocab_size", "parameters")


class Matched(NamedTuple):
    pairs: list[tuple[int, int]]  # (student block, teacher block), from 0
    origin: str  # what the dry run and the log say of them


def match_layers(pairs: Pairs, student: Anatomy, teacher: Anatomy) -> Matched:
    matched, origin = choose(pairs, student, teacher)
    for k, pair in enumerate(matched):
        for side, block, layers in zip(("student", "teacher"), pair, (student.layers, teacher.layers), strict=True):
            if not 0 <= block < layers:
                raise UserError(f"pairs.explicit[{k}] must name {side} blocks 0 to {layers - 1}, but is {list(pair)}")
    if pairs.skip_last >= len(matched):
        raise UserError(f"pairs.skip_last must leave a pair, but is {pairs.skip_last} of {len(matched)} pairs")
    return Matched(matched[: len(matched) - pairs.skip_last], origin)


def choose(pairs: Pairs, student: Anatomy, teacher: Anatomy) -> Matched:
    if pairs.explicit:
        return Matched([(s, t) for s, t in pairs.explicit], "as pairs.explicit lists them")
    if pairs.rule == "uniform":
        return Matched(uniform(student.layers, teacher.layers), "by pairs.rule = 'uniform'")
    if (cut := read_cut(student)) and cut["teacher"] == shape_of(teacher):
        return Matched(list(enumerate(cut["blocks"])), "as the student was cut from the teacher")
    reason = "is of another teacher" if cut else "is not there"
    return Matched(uniform(student.layers, teacher.layers), f"uniform, for {CUT} in student.path {reason}")


def uniform(layers_s: int, layers_t: int) -> list[tuple[int, int]]:
    """Student block k with the last teacher block of its share: ceil((k+1)·K_t/K_s) − 1."""
    if layers_s > layers_t:
        raise UserError(
            f"pairs.explicit must list pairs where the student is deeper, but it has {layers_s} blocks over {layers_t}"
        )
    return [(k, -(-(k + 1) * layers_t // layers_s) - 1) for k in range(layers_s)]


def spread(count: int, layers: int) -> list[int]:
    """`count` of `layers` blocks, the first and the last among them and the rest evenly between; a single one is the first,
    which knows what to do with embeddings."""
    gaps = max(1, count - 1)
    return [(2 * k * (layers - 1) + gaps) // (2 * gaps) for k in range(count)]


def shape_of(teacher: Anatomy) -> dict:
    """What tells one teacher from another, and not from one that was tuned further."""
    return {key: getattr(teacher, key) for key in SAME}


def cut_map(teacher: Anatomy, blocks: list[int]) -> dict:
    return {"blocks": blocks, "teacher": shape_of(teacher)}


def read_cut(student: Anatomy) -> dict | None:
    path = Path(student.folder) / CUT
    if not path.is_file():
        return None
    with files_at(path):
        text = path.read_bytes()
    try:
        cut = parse_json(text)
    except ValueError:
        cut = None
    if not (fits(cut, FORM) and is_cut(cut, student.layers)):
        raise UserError(
            f"{path} must list a teacher's block for each of the student's {student.layers} in rising order, but is "
            f"{shown(cut)}; write it with tools/cut_student.py, or remove it"
        )
    return cut


def is_cut(cut: dict, layers: int) -> bool:
    blocks, depth = cut["blocks"], cut["teacher"].get("layers")
    whole = all(type(block) is int for block in (*blocks, depth))
    return whole and len(blocks) == layers and blocks == sorted({*blocks}) and 0 <= blocks[0] <= blocks[-1] < depth
