"""Which blocks of student and teacher are matched: those that the run file lists, those of the cut, or those of a rule.

ted-scale cut-student writes a map into the student's folder (CUT): the teacher's block from which each of the student's blocks
comes. This map is the default if the teacher has the shape of the teacher that was cut: it is this teacher, or this teacher
trained further. For a student that was not cut, the default is TED's own rule. That rule never matches the first block.
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
    origin: str  # how they were chosen, for the dry run and the log


def match_layers(pairs: Pairs, student: Anatomy, teacher: Anatomy) -> Matched:
    """The pairs by the keys of [pairs], without the last `skip_last`. A UserError if a block does not exist or no pair is left."""
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
    last = teacher.layers - 1
    if pairs.rule == "last":
        return Matched([(student.layers - 1, last)], "by pairs.rule = 'last'")
    if pairs.rule == "late_to_early":
        return Matched([(student.layers // 8, last)], "by pairs.rule = 'late_to_early'")
    if pairs.rule == "uniform":
        return Matched(uniform(student.layers, teacher.layers), "by pairs.rule = 'uniform'")
    if (cut := read_cut(student)) and cut["teacher"] == shape_of(teacher):
        return Matched(list(enumerate(cut["blocks"])), "as the student was cut from the teacher")
    reason = f"{CUT} in student.path is of another teacher" if cut else f"student.path has no {CUT}"
    return Matched(uniform(student.layers, teacher.layers), f"uniform, because {reason}")


def uniform(layers_s: int, layers_t: int) -> list[tuple[int, int]]:
    """Student block k gets the last teacher block of its share: ceil((k+1)·K_t/K_s) − 1."""
    if layers_s > layers_t:
        raise UserError(
            f"pairs.explicit must list pairs for a student of more blocks than its teacher ({layers_s} and {layers_t}), but is "
            "missing; list them, set pairs.rule = 'late_to_early', or swap student.path and teacher.path"
        )
    return [(k, -(-(k + 1) * layers_t // layers_s) - 1) for k in range(layers_s)]


def shape_of(teacher: Anatomy) -> dict:
    """Values that differ between two teachers, but not between a teacher and a version of it that was trained further."""
    return {key: getattr(teacher, key) for key in SAME}


def cut_map(teacher: Anatomy, blocks: list[int]) -> dict:
    return {"blocks": blocks, "teacher": shape_of(teacher)}


def read_cut(student: Anatomy) -> dict | None:
    """The map that cut-student wrote into the student's folder. None if the student was not cut."""
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
            f"{shown(cut)}; write it with ted-scale cut-student, or remove it"
        )
    return cut


def is_cut(cut: dict, layers: int) -> bool:
    blocks, depth = cut["blocks"], cut["teacher"].get("layers")
    whole = all(type(block) is int for block in (*blocks, depth))
    return whole and len(blocks) == layers and blocks == sorted({*blocks}) and 0 <= blocks[0] <= blocks[-1] < depth
