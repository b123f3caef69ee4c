"""What arms of a comparison promise: a teacher that is asked seldom teaches the same for less, a hint costs nothing once it is
over, and a small teacher's last block guides an early block of a larger student."""

import pytest
import torch
from plain import build, make_batch, make_shard, make_world, run_step
from tiny import make_model

from ted_scale.distill.flops import step_flops


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("arms"))


def test_over_four_steps_a_teacher_that_is_asked_for_one_has_the_gradient_of_one_that_is_always_asked(world):
    batch, seldom, always = [make_batch()], build(world, teacher={"every": 4}), build(world)
    first = seldom.stage.first_step
    each = [run_step(seldom, batch, *seldom.stage.of_micro_batches(first + k, 1))[1] for k in range(4)]
    _, wanted = run_step(always, batch)
    for name, gradient in wanted.items():
        found = sum(gradients.get(name, torch.zeros_like(gradient)) for gradients in each) / 4
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def work(world, step: int = -1, **sections) -> float:
    """FLOPs a token, of stage II's step (from its end)."""
    parts = build(world, **sections)
    return step_flops(parts.plan, parts.stage, parts.stage.last_step + step, lambda window: 32).model


def test_by_counted_work_a_hint_that_is_over_costs_nothing_and_a_teacher_that_is_asked_seldom_a_quarter(world):
    ce, kd = (work(world, method=method) for method in ("ce", "kd"))
    assert work(world, loss={"preset": "hint"}, train={"steps": 20}) == kd < work(world)
    assert work(world, method="kd", teacher={"every": 4}) - ce == pytest.approx((kd - ce) / 4)


def test_with_let_the_last_block_of_a_small_teacher_guides_an_early_one_of_a_larger_student(tmp_path):
    make_model(tmp_path / "teacher", "llama", num_hidden_layers=2)
    make_model(tmp_path / "student", "llama", num_hidden_layers=16, hidden_size=48, seed=1)
    make_shard(tmp_path / "corpus")
    parts = build(tmp_path, method="lwd", loss={"preset": "let"})
    assert parts.plan.pairs == [(2, 1)]
    weights = parts.stage.weights(0)
    (losses,), gradients = run_step(parts, [make_batch()], weights._replace(ce=0.0))
    assert losses.kl == 0 < losses.layer
    moved = {
        int(name.split("layers.")[1].split(".")[0]) for name, g in gradients.items() if "layers." in name and g.any()
    }
    assert moved == {0, 1, 2}
