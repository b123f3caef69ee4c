"""Matched layers: by the method's rule, from a list, and from the map of a student that was cut."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest

from ted_scale.base.errors import UserError
from ted_scale.commands.cutting.blocks import spread
from ted_scale.config.method import Pairs
from ted_scale.distill.pairs import CUT, cut_map, match_layers


def model(layers: int, folder="nowhere", **other) -> SimpleNamespace:
    shape = {"family": "llama", "width": 32, "vocab_size": 128, "parameters": 1000 * layers}
    return SimpleNamespace(layers=layers, folder=folder, **{**shape, **other})


def match(pairs: Pairs, layers_s: int, layers_t: int) -> list[tuple[int, int]]:
    return match_layers(pairs, model(layers_s), model(layers_t)).pairs


def official(layers_s: int, layers_t: int) -> list[tuple[int, int]]:
    """The authors' code: a filter sits on block i of the teacher if (i + 1) is a multiple of the interval."""
    interval = layers_t // layers_s
    return list(enumerate(i for i in range(layers_t) if (i + 1) % interval == 0))


@pytest.mark.parametrize(("layers_s", "layers_t"), [(6, 12), (12, 12), (4, 24), (1, 7), (16, 32)])
def test_uniform_pairs_are_the_official_ones_where_the_depths_divide(layers_s, layers_t):
    assert match(Pairs(), layers_s, layers_t) == official(layers_s, layers_t)


def test_twelve_blocks_onto_six_are_every_second_from_the_second():
    assert match(Pairs(), 6, 12) == [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]


def test_where_the_depths_do_not_divide_a_block_takes_the_end_of_its_share():
    """Shares of 2.4 blocks end at 2.4, 4.8, 7.2, 9.6 and 12: in the third, fifth, eighth, tenth and twelfth block."""
    assert match(Pairs(), 5, 12) == [(0, 2), (1, 4), (2, 7), (3, 9), (4, 11)]


@pytest.mark.parametrize(("layers_s", "layers_t"), [(7, 12), (5, 12), (9, 32), (28, 36), (11, 12)])
def test_uniform_pairs_end_with_both_last_blocks_and_use_no_block_twice(layers_s, layers_t):
    pairs = match(Pairs(), layers_s, layers_t)
    students, teachers = zip(*pairs, strict=True)
    assert pairs[-1] == (layers_s - 1, layers_t - 1)
    assert students == tuple(range(layers_s))
    assert list(teachers) == sorted(set(teachers))
    gaps = {b - a for a, b in pairwise(teachers)}
    assert max(gaps) - min(gaps) <= 1  # evenly spread


@pytest.mark.parametrize(("layers_s", "layers_t"), [(6, 12), (30, 12), (1, 4)])
def test_last_and_late_to_early_match_the_teacher_s_last_block_alone(layers_s, layers_t):
    """Also where the student is the deeper one."""
    assert match(Pairs(rule="last"), layers_s, layers_t) == [(layers_s - 1, layers_t - 1)]
    assert match(Pairs(rule="late_to_early"), layers_s, layers_t) == [(layers_s // 8, layers_t - 1)]


def test_skip_last_leaves_out_the_last_pairs_of_either_rule():
    assert match(Pairs(skip_last=2), 4, 8) == [(0, 1), (1, 3)]
    assert match(Pairs(explicit=[(0, 7), (3, 1)], skip_last=1), 4, 8) == [(0, 7)]


def test_explicit_pairs_replace_the_rule_and_may_match_a_deeper_student():
    assert match(Pairs(explicit=[(11, 5), (3, 1)]), 12, 6) == [(11, 5), (3, 1)]


REFUSED = {
    "student outside": (
        {"explicit": [(0, 0), (4, 1)]},
        r"pairs.explicit\[1\] must name student blocks 0 to 3, but is \[4, 1\]",
    ),
    "teacher outside": (
        {"explicit": [(0, 8)]},
        r"pairs.explicit\[0\] must name teacher blocks 0 to 7, but is \[0, 8\]",
    ),
    "negative": ({"explicit": [(-1, 0)]}, r"pairs.explicit\[0\] must name student blocks 0 to 3, but is \[-1, 0\]"),
    "all skipped": ({"skip_last": 4}, r"pairs.skip_last must leave a pair, but is 4 of 4 pairs"),
}


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED)
def test_pairs_outside_a_network_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        match(Pairs(**values), 4, 8)


def test_a_deeper_student_must_list_its_pairs():
    with pytest.raises(
        UserError, match=r"pairs.explicit must list pairs for a student of more blocks than its teacher \(12 and 6\)"
    ):
        match(Pairs(), 12, 6)


def test_a_cut_of_ten_of_thirty_has_both_ends_and_the_rest_between():
    assert spread(10, 30) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_a_cut_is_even_and_a_single_block_is_the_first(layers):
    for count in range(1, layers + 1):
        blocks = spread(count, layers)
        gaps = {b - a for a, b in pairwise(blocks)} or {0}
        assert len(blocks) == count and blocks[0] == 0 and max(gaps) - min(gaps) <= 1
        assert blocks[-1] == (layers - 1 if count > 1 else 0)


def cut_student(folder, blocks: list[int], teacher) -> SimpleNamespace:
    (folder / CUT).write_text(json.dumps(cut_map(teacher, blocks)))
    return model(len(blocks), folder)


def test_a_cut_student_is_matched_as_it_was_cut_beside_a_teacher_of_that_shape_alone(tmp_path):
    student = cut_student(tmp_path, [0, 2, 7], model(8))
    pairs, origin = match_layers(Pairs(), student, model(8, folder="tuned further"))
    assert (pairs, origin) == ([(0, 0), (1, 2), (2, 7)], "as the student was cut from the teacher")
    for other in (model(9), model(8, family="qwen2"), model(8, parameters=8001)):
        pairs, origin = match_layers(Pairs(), student, other)
        assert pairs == match(Pairs(), 3, other.layers)
        assert origin == "uniform, because cut.json in student.path is of another teacher"
    assert match_layers(Pairs(), model(3, tmp_path / "none"), model(8)).origin.endswith("student.path has no cut.json")


def test_pairs_of_the_run_file_take_precedence_over_the_cut(tmp_path):
    student = cut_student(tmp_path, [0, 2, 7], model(8))
    listed = match_layers(Pairs(explicit=[(2, 5)]), student, model(8))
    assert listed == ([(2, 5)], "as pairs.explicit lists them")
    assert match_layers(Pairs(rule="uniform"), student, model(8)).pairs == match(Pairs(), 3, 8)
    assert match_layers(Pairs(skip_last=1), student, model(8)).pairs == [(0, 0), (1, 2)]


DAMAGED = {
    "no JSON": "{",
    "another student's": {"blocks": [0, 2]},
    "falling": {"blocks": [0, 7, 2]},
    "past the teacher": {"blocks": [0, 2, 8]},
    "no numbers": {"blocks": [0, 2.0, "7"]},
    "no teacher": {"teacher": {}},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_map_that_cannot_be_the_student_s_is_refused_in_one_sentence(tmp_path, damage):
    student = cut_student(tmp_path, [0, 2, 7], model(8))
    sound = json.loads((tmp_path / CUT).read_text())
    (tmp_path / CUT).write_text(damage if isinstance(damage, str) else json.dumps({**sound, **damage}))
    with pytest.raises(
        UserError, match=r"cut.json must list a teacher's block for each of the student's 3 in"
    ) as caught:
        match_layers(Pairs(), student, model(8))
    assert str(caught.value).isprintable()
