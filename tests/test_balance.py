"""loss.balance = "auto": the layer loss is scaled by the means of earlier steps, which a checkpoint keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny import make_run

from ted_scale.balance import STEPS, followed, scale_of
from ted_scale.checkpoints.progress import Progress, parse_progress, progress_as_bytes
from ted_scale.distill.stages import of_step, stages_of
from ted_scale.health import spikes
from ted_scale.health.rewind import gone_back


def stage_two(**sections):
    sections = {"loss": {"balance": "auto", **sections.pop("loss", {})}, **sections}
    return stages_of(make_run(Path("/x"), **sections))[-1]


def take(stage, progress: Progress, kl: float, layer: float, count: int = 1):
    """(the step's weights, its named losses, the progress after it) where every micro-batch has these values."""
    each = stage.of_micro_batches(progress.step, count, scale_of(progress, stage))
    weights = of_step(each)
    sums = [9.0, 1.0, kl * weights.asked, layer * weights.asked, layer * weights.asked, layer * weights.asked]
    losses = stage.name_losses(sums, weights)
    return each, losses, followed(progress.advanced(8, 32), stage, losses)


def test_equal_weights_make_both_terms_equally_large_from_the_second_step_on():
    stage, progress = stage_two(loss={"layer": 0.5}), Progress(4)
    each, _, progress = take(stage, progress, 6.0, 0.25)
    assert each[0].layer == 0.5  # nothing is known before the first step
    for _ in range(3):
        each, losses, progress = take(stage, progress, 6.0, 0.25)
        assert each[0].kl == 1.0 and each[0].layer * 0.25 == 0.5 * 6.0
        assert losses["loss/layer_weight"] == each[0].layer


def test_a_step_s_own_losses_do_not_change_its_weights_and_one_step_changes_later_ones_little():
    stage, progress = stage_two(), Progress(4)
    for _ in range(3 * STEPS):
        *_, progress = take(stage, progress, 2.0, 1.0)
    each, _, progress = take(stage, progress, 200.0, 1.0)
    assert each[0].layer == pytest.approx(2.0)
    assert scale_of(progress, stage) == pytest.approx(2.0 + 198.0 / STEPS)


def test_a_layer_weight_of_0_stays_0_and_the_means_wait():
    stage, progress = stage_two(loss={"preset": "hint"}, train={"steps": 20}), Progress(4)
    for _ in range(2):
        *_, progress = take(stage, progress, 6.0, 0.5)
    each, losses, after = take(stage, progress, 3.0, 0.0)
    assert each[0].layer == 0.0 and after.balance == progress.balance
    assert not {"loss/layer", "loss/layer_weight"} & losses.keys()


def test_where_the_teacher_is_asked_seldom_only_its_answers_count_and_the_logged_weight_is_the_mean_one():
    stage, progress = stage_two(teacher={"every": 4}), Progress(4)
    found = []
    for _ in range(8):
        each, losses, progress = take(stage, progress, 6.0, 0.5)
        found.append((each[0].layer, losses.get("loss/layer_weight")))
    assert found == [(4.0, 1.0)] + [(0.0, None)] * 3 + [(48.0, 12.0)] + [(0.0, None)] * 3
    assert progress.balance.steps == 2


def test_a_dropped_step_and_fixed_weights_and_stage_one_follow_nothing():
    auto, fixed = stage_two(), stage_two(loss={"balance": "fixed"})
    both = {"loss/kl": 1.0, "loss/layer": 1.0}
    assert followed(Progress(), auto, {"optim/lr": 0.1}).balance is None
    assert followed(Progress(), fixed, both).balance is None
    assert followed(Progress(), stages_of(auto.run)[0], both).balance is None
    assert followed(Progress(), auto, both).balance is not None
    assert "loss/layer_weight" not in take(fixed, Progress(4), 1.0, 1.0)[1]


@pytest.mark.parametrize("terms", [(0.0, 1.0), (-1e-9, 1.0), (1.0, 0.0)])
def test_a_student_that_is_its_teacher_keeps_the_written_weight(terms):
    stage = stage_two()
    *_, progress = take(stage, Progress(4), *terms)
    assert take(stage, progress, *terms)[0][0].layer == 1.0


def test_a_checkpoint_keeps_the_means_to_the_last_bit_and_a_rewind_takes_those_of_its_checkpoint():
    stage, progress = stage_two(), Progress(4)
    for k in range(3):
        *_, progress = take(stage, progress, 1 / 3 + k, 0.1 * k + 0.3)
    read = parse_progress(progress_as_bytes(progress).decode(), "a test")
    assert read.balance == progress.balance and scale_of(read, stage) == scale_of(progress, stage)
    *_, later = take(stage, progress, 50.0, 1.0)
    assert scale_of(gone_back(read, later), stage) == scale_of(progress, stage) != scale_of(later, stage)


def test_other_terms_start_the_means_again_but_other_weights_and_the_end_of_a_term_do_not():
    stage = stage_two(loss={"kl": {"start": 1, "off_after": 0.5}})
    *_, progress = take(stage, Progress(4), 6.0, 0.5)
    late = replace(progress, step=9)
    assert spikes.ground_of(stage, [stage.weights(9)]) != spikes.ground_of(stage, [stage.weights(4)])
    assert stage.weights(9, scale_of(late, stage))[1:3] == (0.0, 12.0)  # the last balance holds where the KL has ended
    assert scale_of(progress, stage_two(loss={"layer": 3.0, "backend": "torch"})) == 12.0
    other = stage_two(loss={"kind": "mse"})
    assert scale_of(progress, other) == 1.0
    assert take(other, progress, 6.0, 3.0)[2].balance.steps == 1


def test_without_kl_there_is_nothing_to_balance_with():
    with pytest.raises(ValidationError, match=r"loss.balance must be 'fixed' where loss.kl is 0, but is 'auto'"):
        stage_two(loss={"kl": 0})
    assert not make_run(Path("/x"), method="kd", loss={"balance": "auto", "kl": 0}).balances
