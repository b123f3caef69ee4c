"""An alarm is raised where it should be, once until its cause is gone, and never by numbers of a run that fares well."""

import pytest
from plain import build, make_world

from ted_scale.vitals.alarms import KEPT, RECENT, alarms

LN_V = 10.8
WELL = {
    "vitals/error/0": [0.9, 0.8, 0.72, 0.66, 0.62, 0.6, 0.59, 0.61, 0.6],
    "vitals/rank_filter_s/0": [30, 33, 35, 34], "vitals/rank_filter_t/0": [50, 52, 51, 50],
    "vitals/pull/0": [0.6, 0.5, 0.7], "vitals/pull_cosine/0": [0.2, 0.02, -0.04],
    "vitals/saturated_s": [0.1, 0.12, 0.1], "vitals/saturated_t": [0.2, 0.18, 0.22],
    "vitals/teacher_ce": [2.9, 3.1, 2.8], "vitals/student_ce": [4.1, 4.0, 3.9],
}  # fmt: skip
ILL = {
    "the student's filter 0": {"vitals/rank_filter_s/0": [30, 12, 4, 3]},
    "the teacher's filter 0": {"vitals/rank_filter_t/0": [1.2] * 3, "vitals/rank_filter_s/0": [1.1] * 3},
    "error 0": {"vitals/error/0": [0.7, 0.6, 0.5, 0.5, 0.5, 0.7, 0.8, 0.8]},
    "pull 0": {"vitals/pull_cosine/0": [-0.2, -0.3, -0.25]},
    "logits of the teacher": {"vitals/saturated_t": [0.7, 0.8, 0.6]},
    "logits of the student": {"vitals/saturated_s": [0.7, 0.8, 0.6]},
    "the teacher's text": {"vitals/teacher_ce": [4.2, 4.3, 4.2]},
}


def test_a_run_that_fares_well_has_no_alarm():
    assert alarms(WELL, LN_V) == {}
    assert alarms({}, LN_V) == {}


@pytest.mark.parametrize("cause", ILL)
def test_each_cause_alone_is_found_and_has_a_sentence_with_what_to_try(cause):
    found = alarms(WELL | ILL[cause], LN_V)
    assert found.keys() == {cause}
    assert any(key in found[cause] for key in ("loss.", "filters.", "train.", "pairs."))


@pytest.mark.parametrize(
    "errors", [[0.001, 0.06, 0.1, 0.16, 0.18, 0.2, 0.22], [0.3, 0.3, 0.3, 0.7, 0.7, 0.7, 0.66, 0.65, 0.64]]
)
def test_an_error_may_grow_while_it_is_small_and_may_settle(errors):
    """As in the first blocks of a student that was cut from its teacher."""
    assert alarms(WELL | {"vitals/error/0": errors}, LN_V) == {}


def test_nothing_is_judged_by_fewer_samples_than_a_mean_needs():
    fewer = {key: values[-(RECENT - 1) :] for values_of in ILL.values() for key, values in values_of.items()}
    assert alarms(fewer, LN_V) == {}


@pytest.mark.parametrize(("loss", "cause"), [(9.0, "the teacher's text"), (10.7, "a teacher at chance")])
def test_a_teacher_that_knows_nothing_is_found_even_if_the_student_knows_less(loss, cause):
    assert alarms(WELL | {"vitals/teacher_ce": [loss] * 3, "vitals/student_ce": [10.9] * 3}, LN_V).keys() == {cause}


def test_a_layer_loss_that_is_hardly_felt_may_pull_where_it_likes():
    assert alarms(WELL | ILL["pull 0"] | {"vitals/pull/0": [0.01] * 3}, LN_V) == {}


def test_an_alarm_comes_once_and_again_only_after_its_cause_was_gone(tmp_path):
    vitals, said = build(make_world(tmp_path)).student.vitals, []
    values = [0.5] * RECENT + [0.9] * 5 + [0.5] * RECENT + [0.9] * RECENT
    for step, value in enumerate(values):
        vitals.judge(step, {"vitals/error/0": value}, lambda title, text: said.append((title, text)))
    steps = [int(text.partition(":")[0].removeprefix("step ")) for _, text in said]
    assert len(steps) == 2 and steps[0] < RECENT + 5 and steps[1] >= 2 * RECENT + 5
    assert {title for title, _ in said} == {"vitals: error 0"}


def test_what_is_kept_of_a_long_run_does_not_grow(tmp_path):
    vitals = build(make_world(tmp_path)).student.vitals
    for step in range(3 * KEPT):
        vitals.judge(step, {"vitals/error/0": 0.5}, lambda *_: None)
    assert len(vitals.history["vitals/error/0"]) == KEPT
