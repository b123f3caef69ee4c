"""Stages, learning rates and loss weights by step: pure functions, so that a resume gets the same values."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import make_run

from ted_scale.config.method import Train
from ted_scale.distill.signal import Weights
from ted_scale.distill.stages import Stage, of_step, rate_at, set_rates, stages_of, weight_at

FLOOR = 0.1


def train(**values) -> Train:
    base = {"steps": 100, "tokens_per_step": 256, "micro_batch": 1, "lr": 1e-3, "min_lr": FLOOR * 1e-3}
    return Train.model_validate({**base, **values})


def rates(**values) -> list[float]:
    settings = train(**values)
    return [rate_at(settings, done) for done in range(settings.steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_rises_by_equal_steps_to_the_peak(schedule):
    assert rates(schedule=schedule, warmup_steps=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(schedule):
    assert rates(schedule=schedule)[0] == 1.0


@pytest.mark.parametrize(("schedule", "end"), [("cosine", FLOOR), ("wsd", FLOOR), ("constant", 1.0)])
def test_each_schedule_ends_where_it_says(schedule, end):
    assert rates(schedule=schedule, warmup_steps=10)[-1] == pytest.approx(end)
    assert rates(schedule=schedule, min_lr=0.0)[-1] == pytest.approx(0.0 if schedule != "constant" else 1.0)


def test_cosine_is_half_way_down_in_the_middle_and_never_rises():
    values = rates(schedule="cosine", warmup_steps=20)
    assert values[60] == pytest.approx((1 + FLOOR) / 2)
    assert all(a >= b for a, b in pairwise(values[19:]))


def test_wsd_is_flat_and_then_falls_in_a_line():
    values = rates(schedule="wsd", warmup_steps=10, decay_fraction=0.4)
    assert values[10:61] == [1.0] * 51
    falls = [a - b for a, b in pairwise(values[60:])]
    assert falls == pytest.approx([0.9 / 40] * 40)


def test_a_constant_rate_ignores_min_lr():
    assert set(rates(schedule="constant")) == {1.0}


def weight(**values):
    return make_run(Path("/x"), loss={"layer": values}).loss.layer


def test_a_plain_weight_is_constant():
    assert [weight_at(3.0, f) for f in (0, 0.5, 1)] == [3.0, 3.0, 3.0]
    assert [weight_at(weight(start=2), f) for f in (0, 0.5, 0.99)] == [2.0, 2.0, 2.0]


def test_linear_and_cosine_weights_go_from_start_to_end():
    line, wave = weight(start=2, end=1, shape="linear"), weight(start=2, end=1, shape="cosine")
    assert [weight_at(line, f) for f in (0, 0.25, 1)] == pytest.approx([2.0, 1.75, 1.0])
    quarter = 1 + 0.5 * (1 + math.cos(math.pi / 4))
    assert [weight_at(wave, f) for f in (0, 0.25, 0.5, 1)] == pytest.approx([2.0, quarter, 1.5, 1.0])


def test_a_weight_may_rise():
    rising = weight(start=0, end=4, shape="linear")
    assert [weight_at(rising, f) for f in (0, 0.5, 1)] == [0.0, 2.0, 4.0]


def test_off_after_ends_a_weight_from_that_fraction_on():
    stops = weight(start=2, end=1, shape="linear", off_after=0.5)
    assert [weight_at(stops, f) for f in (0, 0.49, 0.5, 0.9)] == pytest.approx([2.0, 1.51, 0.0, 0.0])


def test_on_after_begins_a_weight_at_that_fraction():
    late = weight(start=2, end=1, shape="linear", on_after=0.5, off_after=0.9)
    assert [weight_at(late, f) for f in (0, 0.49, 0.5, 0.9)] == pytest.approx([0.0, 0.0, 1.5, 0.0])


def test_a_weight_may_end_after_so_many_tokens():
    stops = weight(start=2, off_after_tokens=1000)
    assert [weight_at(stops, tokens / 1500, 1500) for tokens in (0, 999, 1000)] == [2.0, 2.0, 0.0]


def test_a_weight_may_begin_after_so_many_tokens():
    late = weight(start=2, on_after_tokens=1000)
    assert [weight_at(late, tokens / 1500, 1500) for tokens in (0, 999, 1000)] == [0.0, 0.0, 2.0]


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 1.75), ("cosine", 1 + 0.5 * (1 + math.cos(math.pi / 4)))])
def test_a_weight_over_tokens_is_at_its_end_after_so_many_and_stays_there(shape, quarter):
    """In a stage of any length: what it is depends on the tokens alone."""
    falls = weight(start=2, end=1, shape=shape, over_tokens=1000)
    for stage in (1024, 4096):
        found = [weight_at(falls, tokens / stage, stage) for tokens in (0, 250, 500, 1000, 1024)]
        assert found == pytest.approx([2.0, quarter, 1.5, 1.0, 1.0])


def test_a_term_that_has_fallen_to_0_over_tokens_is_off():
    """So the teacher is asked no more."""
    kl = {"start": 1, "end": 0, "shape": "cosine", "over_tokens": 4 * 256}
    stage = stages(method="kd", loss={"kl": kl}, train={"steps": 6})[0]
    assert [stage.weights(step).kl > 0 for step in range(6)] == [True] * 4 + [False] * 2


def test_a_weight_may_follow_the_learning_rate():
    follows = weight(start=2, shape="rate", off_after=0.9)
    assert [weight_at(follows, f, rate=rate) for f, rate in ((0, 0.1), (0.5, 1.0), (0.8, 0.25), (0.9, 0.2))] == [
        0.2,
        2.0,
        0.5,
        0.0,
    ]


def stages(**sections) -> list[Stage]:
    return stages_of(make_run(Path("/x"), **sections))


@pytest.mark.parametrize("method", ["ce", "kd", "lwd"])
def test_a_method_without_filters_to_learn_has_one_stage(method):
    (stage,) = stages(method=method)
    assert (stage.name, stage.first_step, stage.last_step) == ("student", 0, 6)


def test_ted_learns_filters_and_then_distils():
    first, second = stages()
    assert (first.name, first.first_step, first.last_step) == ("filters", 0, 4)
    assert (second.name, second.first_step, second.last_step) == ("student", 4, 10)
    assert first.learns_filters and not second.learns_filters


def test_ted_with_filters_of_another_run_has_stage_two_only():
    (stage,) = stages(filters={"from": "/another/run"})
    assert (stage.name, stage.first_step, stage.steps) == ("student", 0, 6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("ce", Weights(0.5, 0.0, 0.0)),
        ("kd", Weights(0.5, 2.0, 0.0)),
        ("lwd", Weights(0.5, 2.0, 3.0)),
        ("ted", Weights(0.5, 2.0, 3.0)),
    ],
)
def test_a_method_switches_on_its_own_terms_only(method, expected):
    stage = stages(method=method, loss={"ce": 0.5, "kl": 2.0, "layer": 3.0})[-1]
    assert stage.weights(stage.first_step) == stage.weights(stage.last_step - 1) == expected


def test_stage_one_has_the_filters_loss_alone():
    weights = stages()[0].weights(2)
    assert weights[:3] == Weights(0.0, 0.0, 1.0)[:3]
    assert weights == stages()[0].weights(2) and weights.sample_seed != stages()[0].weights(3).sample_seed


def test_the_hint_preset_ends_the_layer_loss_after_a_tenth_of_stage_two():
    stage = stages(loss={"preset": "hint"}, filters={"steps": 40}, train={"steps": 100})[1]
    layer = [stage.weights(step).layer for step in range(40, 140)]
    assert layer == [1.0] * 10 + [0.0] * 90


def test_the_wsd_preset_ties_the_teacher_s_weight_to_the_learning_rate():
    stage = stages(loss={"preset": "wsd"}, train={"steps": 100, "schedule": "wsd"})[1]
    steps = range(stage.first_step, stage.last_step)
    assert [stage.weights(step).kl for step in steps] == [stage.rate(step) for step in steps]
    assert stage.weights(steps[-1]).kl < 0.1 and stage.weights(steps[-1]).ce == 1.0


def test_the_let_preset_has_a_falling_layer_loss_and_no_kl():
    (stage,) = stages(method="lwd", loss={"preset": "let"}, train={"steps": 10})
    assert [stage.weights(step)[1:3] for step in (0, 5)] == [(0.0, 0.1), (0.0, 0.05)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_a_teacher_that_is_asked_for_one_micro_batch_in_four_weighs_as_much_as_one_that_is_always_asked(count):
    stage = stages(teacher={"every": 4}, loss={"kl": 0.5, "layer": 2.0})[1]
    each = [w for step in range(4, 8) for w in stage.of_micro_batches(step, count)]
    assert [bool(w.kl) for w in each] == [k % 4 == 0 for k in range(4 * count)]
    assert all(bool(w.kl) == bool(w.layer) and w.ce == 1.0 for w in each)
    assert [sum(w[i] for w in each) / len(each) for i in (1, 2)] == [0.5, 2.0]


def test_the_terms_of_a_teacher_that_is_asked_seldom_are_shown_as_means_over_what_it_saw():
    stage = stages(method="kd", teacher={"every": 4})[0]
    weights = of_step(stage.of_micro_batches(0, 8))
    assert weights.asked == 0.25
    assert stage.name_losses([3.0, 2.0, 0.25, 0.0], weights)["loss/kl"] == 1.0
    none = of_step(stage.of_micro_batches(1, 2))
    assert not none.kl and set(stage.name_losses([2.0, 2.0, 0.0, 0.0], none)) == {"loss/total", "loss/ce"}


def test_stage_one_asks_the_teacher_always():
    first = stages(teacher={"every": 4})[0]
    assert all(w == first.weights(1) for w in first.of_micro_batches(1, 5))


def test_weights_follow_the_stage_s_own_clock():
    """They depend on the fraction of stage II, whether or not there was a stage I."""
    kl = {"kl": {"start": 1, "end": 0, "shape": "linear"}}
    second, alone = stages(loss=kl)[1], stages(loss=kl, filters={"from": "/x"})[0]
    assert [second.weights(4 + k) for k in range(6)] == [alone.weights(k) for k in range(6)]
    assert [second.rate(4 + k) for k in range(6)] == [alone.rate(k) for k in range(6)]


def test_stage_one_s_rate_warms_up_and_falls_to_nothing():
    stage = stages(filters={"steps": 100})[0]
    values = [stage.rate(step) for step in range(101)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[-1] == pytest.approx(0.0)
    assert max(values) == 1.0


def engine(*roles):
    groups = [{"role": role, "peak_lr": peak, "lr": None} for role, peak in roles]
    module = SimpleNamespace(filters_s=SimpleNamespace(parameters=list))
    return SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups), module=module)


def test_every_group_has_its_own_peak_and_filters_have_rate_0_without_layer_loss():
    student = engine(("decay", 1e-3), ("plain", 1e-3), ("filters", 4e-3))
    set_rates(student, 0.5, [Weights(1.0, 1.0, 1.0)])
    assert [g["lr"] for g in student.optimizer.param_groups] == [5e-4, 5e-4, 2e-3]
    set_rates(student, 0.5, [Weights(1.0, 1.0, 0.0)])
    assert [g["lr"] for g in student.optimizer.param_groups] == [5e-4, 5e-4, 0.0]


def test_saves_and_validations_come_when_due_and_at_the_end_of_a_stage():
    first, second = stages(checkpoint={"every": 3}, validation={"every": 4}, train={"steps": 9})
    assert [s for s in range(1, 5) if first.saves(s)] == [3, 4]
    assert [s for s in range(5, 14) if second.saves(s)] == [6, 9, 12, 13]
    assert [s for s in range(1, 5) if first.validates(s)] == []
    assert [s for s in range(5, 14) if second.validates(s)] == [8, 12, 13]
    only_end = stages(validation={"every": 0})[1]
    assert [s for s in range(5, 11) if only_end.validates(s)] == [10]


def test_a_term_that_is_off_is_not_logged_and_stage_one_names_both_sides():
    first, second = stages()
    sums = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    logits, layers = {"loss/ce": 1.0, "loss/kl": 2.0}, {"loss/layer": 3.0, "loss/layer/0": 4.0, "loss/layer/1": 5.0}
    assert second.name_losses(sums, Weights(1.0, 1.0, 1.0)) == {"loss/total": 9.0, **logits, **layers}
    assert second.name_losses(sums, Weights(0.0, 1.0, 0.0)) == {"loss/total": 9.0, "loss/kl": 2.0}
    sides = {"loss/filter_t/0": 4.0, "loss/filter_s/0": 5.0}
    assert first.name_losses(sums, Weights(0.0, 0.0, 1.0)) == {"loss/total": 9.0, **sides}
