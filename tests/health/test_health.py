"""Dropped updates, loss spikes, rewinds and digests, without ranks: which numbers lead to which decision."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_run

from ted_scale import run as build
from ted_scale.base import durable, sealed
from ted_scale.base.errors import NOT_FINITE, RunStopped
from ted_scale.checkpoints.progress import PROGRESS, Progress, parse_progress, progress_as_bytes
from ted_scale.config.method import Schedule
from ted_scale.distill import entropies
from ted_scale.distill.signal import Losses, Weights
from ted_scale.distill.stages import stages_of
from ted_scale.health import bad_step as report
from ted_scale.health import guard as guards
from ted_scale.health import replicas, spikes
from ted_scale.health.guard import Guard
from ted_scale.health.rewind import Rewind, choose, gone_back
from ted_scale.models.zero import without_padding

NAN, INF = math.nan, math.inf
ALL_ON = Weights(1.0, 1.0, 1.0)


class Zero:
    """DeepSpeed's order of calls, over three sub-groups."""

    def __init__(self):
        self.param_groups = [{"lr": 0.1, "role": "decay"}, {"lr": 0.1, "role": "plain"}, {"lr": 0.1, "role": "filters"}]
        self.sub_group_to_group_id, self.updated, self.clipped = {0: 0, 1: 1, 2: 2}, [], {}

    def _get_norm_groups(self):
        return self.norms

    def unscale_and_clip_grads(self, sub_group, norm):
        self.clipped[sub_group] = float(norm)

    def _optimizer_step(self, sub_group):
        self.updated.append(sub_group)

    def step(self, norm: float):
        self.updated, self.norms = [], [torch.tensor(norm * share) for share in (0.36, 0.48, 0.8)]
        self._get_norm_groups()
        for sub_group in range(3 if math.isfinite(norm) else 0):
            self.unscale_and_clip_grads(sub_group, norm)
            self._optimizer_step(sub_group)


class World:
    """A guard between a loop and Zero; `alerts` are the texts that the user gets."""

    def __init__(self, root: Path, monkeypatch, loss=None, **settings):
        self.run = make_run(root, health=settings, loss=loss or {})
        self.stage, self.zero, self.alerts, self.checkpoints = (
            stages_of(self.run)[-1],
            Zero(),
            [],
            [Path("step_00000004")],
        )
        monkeypatch.setattr(guards, "write_report", lambda engine, event: "report: there")
        monkeypatch.setattr(guards, "forget_gradients", lambda module: None)
        monkeypatch.setattr(guards, "ways_back", lambda folder, first, rewinds: self.checkpoints)
        engine = SimpleNamespace(optimizer=self.zero, module=None)
        self.guard = Guard(engine, self.stage, lambda title, text: self.alerts.append(text), lambda: None)
        self.progress = Progress(self.stage.first_step)

    def step(self, ce: float = 1.0, norm: float = 1.0, tally=None) -> dict:
        terms = torch.tensor([ce, ce, 0.0, 0.0])
        self.guard.add(Losses(*terms, torch.zeros(2), tally))
        self.guard.gather(self.progress, self.guard.stage.of_micro_batches(self.progress.step, 1))
        self.zero.step(norm)
        self.progress = self.guard.decide()
        return self.guard.read()


@pytest.fixture
def world(tmp_path, monkeypatch):
    return lambda **settings: World(tmp_path, monkeypatch, **settings)


def test_the_entropies_of_a_step_that_is_taken_give_the_floor_of_the_next(world):
    at, one = world(on_nonfinite="skip", loss={"skip_low_entropy": 0.25}), torch.ones(4)
    tallies = [entropies.tally(torch.arange(4) + first, one, floor=2.5) for first in (1.0, 2.0)]
    assert at.step(tally=tallies[0])["loss/kl_share"] == 0.5 and 1 < (floor := at.progress.entropy_floor) < 2
    assert "loss/kl_share" not in at.step(tally=entropies.nothing(one)) and at.progress.entropy_floor == floor
    assert "loss/kl_share" not in at.step(ce=NAN, tally=tallies[1]) and at.progress.entropy_floor == floor
    assert at.step(tally=tallies[1])["loss/kl_share"] == 0.75 and 2 < at.progress.entropy_floor < 3
    assert "loss/kl_share" not in at.step()


@pytest.mark.parametrize("numbers", [{"ce": NAN}, {"ce": INF}, {"norm": INF}, {"norm": NAN}], ids=str)
def test_a_step_with_a_nonfinite_number_updates_no_sub_group_and_the_next_step_updates_all(world, numbers):
    at = world(on_nonfinite="skip")
    assert at.step()["loss/ce"] == 1.0 and at.zero.updated == [0, 1, 2]
    assert at.step(**numbers).keys() == {"optim/lr"} and at.zero.updated == []
    assert (at.progress.step, at.progress.samples, at.progress.skipped) == (at.stage.first_step + 2, 16, 1)
    assert at.step()["loss/ce"] == 1.0 and at.zero.updated == [0, 1, 2]
    assert spikes.state_of(at.progress).losses == [1.0, 1.0]
    assert len(at.alerts) == 1 and "its update is dropped, 1 in a row, 1 in all" in at.alerts[0]


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ({"ce": NAN}, "loss/ce of rank 0"),
        ({"norm": INF}, "optim/grad_norm of all ranks together must be finite"),
    ],
)
def test_a_run_stops_at_a_nonfinite_number_unless_it_may_skip(world, numbers, what):
    at = world()
    at.step()
    with pytest.raises(RunStopped) as caught:
        at.step(**numbers)
    assert at.zero.updated == []
    assert str(caught.value).startswith(f"step {at.stage.first_step + 2}: {what}")
    assert "report: there; no weight was updated and the last checkpoint is intact: lower train.lr" in str(caught.value)
    assert caught.value.over == NOT_FINITE


def test_at_most_max_skipped_steps_in_a_row_are_dropped(world):
    at = world(on_nonfinite="skip", max_skipped=2)
    for _ in range(2):
        at.step(NAN), at.step(norm=INF), at.step()
    at.step(NAN), at.step(NAN)
    assert at.progress.skipped == 6
    with pytest.raises(RunStopped, match=r"health.max_skipped = 2 steps before it were dropped as well"):
        at.step(NAN)


def test_a_sum_over_ranks_that_is_infinite_is_reported_as_that_of_all_ranks(world, monkeypatch):
    at = world()
    monkeypatch.setattr(guards, "of_all_ranks", lambda ours: torch.stack([ours, ours]))
    with pytest.raises(RunStopped, match="loss/total of all ranks together must be finite, but is inf"):
        at.step(3e38)


def test_student_and_filters_are_clipped_and_reported_apart(world):
    """A group's sub-groups count together: 0.36 and 0.48 are 0.6."""
    at = world()
    told = at.step(norm=5.0)
    norms = {key: value for key, value in told.items() if key.startswith("optim/grad_norm")}
    assert norms == {
        "optim/grad_norm": 5.0,
        "optim/grad_norm_student": pytest.approx(3.0),
        "optim/grad_norm_filters": pytest.approx(4.0),
    }
    assert at.zero.clipped == pytest.approx({0: 3.0, 1: 3.0, 2: 4.0})


def losses_until(at: World, values) -> None:
    for value in values:
        at.step(value)


def test_a_spike_is_alerted_once_until_the_loss_has_come_down(world):
    at = world(spike_window=8, spike_factor=2.0)
    losses_until(at, [1.0, 1.1, 0.9, 1.0, 2.3, 2.4, 1.0, 2.2])
    first = at.stage.first_step
    assert [text.split(":")[0] for text in at.alerts] == [f"step {first + 5}", f"step {first + 8}"]
    assert "loss/total is 2.3, 2.3 times its median over 4 steps; report: there" in at.alerts[0]
    assert at.zero.updated == [0, 1, 2]


def test_there_is_no_spike_without_enough_losses_to_compare_with_or_with_on_spike_off(world):
    at = world(spike_window=16)
    losses_until(at, [1.0, 9.0, 1.0])
    at.step(9.0)  # of 16 a quarter is there at the next one
    assert at.alerts == []
    off = world(spike_window=4, on_spike="off")
    losses_until(off, [1.0, 1.0, 1.0, 9.0])
    assert off.alerts == []


def test_a_higher_loss_that_lasts_becomes_the_median(world):
    at = world(spike_window=8, spike_factor=1.5)
    losses_until(at, [1.0] * 8 + [2.0] * 20 + [2.5])
    assert len(at.alerts) == 1
    at.step(3.5)
    assert len(at.alerts) == 2


def test_a_resumed_run_finds_the_same_spikes_as_an_uninterrupted_one(world):
    at = world(spike_window=8, spike_factor=2.0)
    losses_until(at, [1.0, 1.1, 0.9])
    at.progress = parse_progress(progress_as_bytes(at.progress).decode(), "a test")
    at.step(2.3)
    assert len(at.alerts) == 1


def test_another_stage_or_another_loss_starts_the_median_again(world, tmp_path):
    at = world(spike_window=4)
    losses_until(at, [1.0, 1.0])
    for run in (at.run, make_run(tmp_path, train={"lr": 1e-5}, checkpoint={"every": 3})):
        assert spikes.state_of(spikes.begin(at.progress, stages_of(run)[-1], [ALL_ON])).losses == [1.0, 1.0]
    for stage in (stages_of(at.run)[0], stages_of(make_run(tmp_path, loss={"kl": 4.0}))[-1]):
        assert spikes.state_of(spikes.begin(at.progress, stage, [ALL_ON])).losses == ()
    without_kl = [ALL_ON._replace(kl=0.0)]  # in some micro-batches, as where the teacher is asked seldom, and in all
    assert spikes.state_of(spikes.begin(at.progress, at.stage, [ALL_ON, *without_kl])).losses == [1.0, 1.0]
    assert spikes.state_of(spikes.begin(at.progress, at.stage, without_kl)).losses == ()


def test_the_run_goes_back_at_most_max_rewinds_times_without_a_step_past_the_spike(world):
    at = world(on_spike="rewind", spike_window=4, max_rewinds=2)
    losses_until(at, [1.0, 1.0])
    before = at.progress  # a checkpoint of this step
    losses_until(at, [1.0, 1.0])
    for samples in (40, 56):
        with pytest.raises(Rewind) as caught:
            at.step(9.0)
        assert (caught.value.checkpoints, caught.value.progress.samples) == (at.checkpoints, samples)
        at.progress = gone_back(before, caught.value.progress)
        assert (at.progress.step, at.progress.tokens, at.progress.samples) == (before.step, before.tokens, samples)
        at.step()
    with pytest.raises(RunStopped, match=r"health.max_rewinds = 2 rewinds led to no step past it"):
        at.step(9.0)


def test_rewinds_are_counted_again_after_a_step_past_the_spike(world):
    at = world(on_spike="rewind", spike_window=4, max_rewinds=1)
    for _ in range(3):
        losses_until(at, [1.0, 1.0])
        before = at.progress
        with pytest.raises(Rewind) as caught:
            at.step(9.0)
        at.progress = gone_back(before, caught.value.progress)
        losses_until(at, [1.0, 1.0])


def test_a_spike_is_alerted_and_the_run_goes_on_if_the_stage_has_no_checkpoint(world):
    at = world(on_spike="rewind", spike_window=4)
    at.checkpoints = []
    losses_until(at, [1.0, 9.0])
    assert "the run goes on: this stage has no checkpoint to go back to yet" in at.alerts[0]
    assert at.zero.updated == [0, 1, 2]


def test_every_further_rewind_goes_back_one_checkpoint_more_within_the_stage():
    names = [f"step_{step:08d}" for step in (8, 6, 4, 2)]
    ways = [choose(names, 4, rewinds) for rewinds in range(4)]
    assert [[int(name[5:]) for name in way] for way in ways] == [[8, 6], [6], [6], [6]]
    assert choose(names, 8, 0) == []


def test_after_a_rewind_the_blend_goes_on_and_is_measured_again_at_the_next_border():
    now = Progress(9, 900, 90, blend={"start": 80}, adaptive={"step": 8, "weights": {"a": 1.0}})
    back = gone_back(Progress(6, 600, 60, blend={"start": 0}, adaptive={"step": 4, "weights": {"a": 0.5}}), now)
    assert back.blend == now.blend
    assert back.adaptive == {"step": 6, "weights": {"a": 1.0}}


def test_a_rewind_loads_into_the_same_engine_and_uses_the_present_run_file(world, tmp_path, monkeypatch):
    at, told = world(on_spike="rewind", spike_window=4), []
    losses_until(at, [1.0, 1.0])
    there = tmp_path / "step_00000002"
    there.mkdir()
    entry = durable.write_file(there / PROGRESS, [progress_as_bytes(at.progress)])
    sealed.seal(there, {PROGRESS: entry}, {"step": 2, "forks": []})
    monkeypatch.setattr(build, "verdict", lambda look, *arguments: look(*arguments))
    monkeypatch.setattr(build, "of_rank_0", lambda look, *arguments: look(*arguments))
    monkeypatch.setattr(build, "share", lambda: (0, 1))
    monkeypatch.setattr(build.state, "load", lambda engine, checkpoint: told.append((engine, checkpoint)))
    alerts = []
    numbers = SimpleNamespace(go_back=told.append, alert=lambda title, text: alerts.append(text))
    way = Rewind([there], at.progress.advanced(8, 32))
    back = build.go_back(at.stage, "engine", way, numbers)
    assert told == [("engine", way.checkpoints[0]), back]
    assert (back.step, back.samples, spikes.state_of(back).losses) == (at.progress.step, 24, [1.0, 1.0])
    other = stages_of(make_run(tmp_path, loss={"kl": 4.0}))[-1]
    back = spikes.state_of(spikes.begin(build.go_back(other, "engine", way, numbers), other, [ALL_ON]))
    assert (back.losses, back.rewinds) == ((), 1)
    newer = tmp_path / "step_00000004"
    shutil.copytree(there, newer)
    sealed.seal(newer, {PROGRESS: entry}, {"step": 4, "forks": []})
    durable.write_file(newer / PROGRESS, [b" " * entry.bytes])
    back = build.go_back(at.stage, "engine", Rewind([newer, there], at.progress), numbers)
    assert (back.step, back.forks) == (at.progress.step, (at.progress.step,))
    assert alerts == [f"checkpoint {newer} is damaged and skipped: progress.json is not as it was written"]
    with pytest.raises(RunStopped, match=r"must hold a whole checkpoint to go back to"):
        build.go_back(at.stage, "engine", Rewind([newer], at.progress), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_digest_depends_on_every_bit_and_its_place(dtype):
    values = torch.arange(37).to(dtype)
    kind = replicas.AS_INTEGERS[values.element_size()]
    seen = {replicas.digest(values).item()}
    for place in range(37):
        for bit in range(8 * values.element_size()):
            other = values.clone()
            other.view(kind)[place] ^= -(1 << bit) if bit == 8 * values.element_size() - 1 else 1 << bit
            seen.add(replicas.digest(other).item())
    assert len(seen) == 1 + 37 * 8 * values.element_size()
    swapped = values.clone()
    swapped[[3, 5]] = swapped[[5, 3]]
    assert replicas.digest(swapped).item() not in seen
    pieces = [replicas.mixed(values.view(kind)[start : start + 8], start).sum().item() for start in range(0, 37, 8)]
    assert (sum(pieces) - replicas.digest(values).item()) % 2**64 == 0


def test_digests_of_zeros_and_minus_zeros_and_of_other_lengths_differ():
    zeros = torch.zeros(8)
    found = {replicas.digest(t).item() for t in (zeros, -zeros, zeros[:7], torch.zeros(0))}
    assert len(found) == 4


def test_the_rank_that_differs_is_named():
    assert replicas.first_alone(["a", "b"], [[1, 5], [1, 6], [1, 5]]) == ("the b", 1, "the bits of rank 0")
    assert replicas.first_alone(["a"], [[2], [1], [1]]) == ("the a", 0, "the bits of rank 1")
    assert replicas.first_alone(["a"], [[1], [2]]) == ("the a", 1, "the bits of rank 0")
    assert replicas.first_alone(["a"], [[1], [1]]) is None
    assert replicas.first_changed(["a", "b"], [[0, 1], [0, 1]]) == ("the teacher's b", 0, "the bits that were loaded")


def test_bits_are_compared_every_so_many_steps_and_before_every_save(tmp_path):
    stage = stages_of(make_run(tmp_path, health={"replicas_every": 4}, checkpoint={"every": 3}))[-1]
    assert [step for step in range(stage.first_step + 1, stage.last_step + 1) if stage.verifies(step)] == [6, 8, 9, 10]
    never = stages_of(make_run(tmp_path))[-1]
    assert not any(never.verifies(step) for step in range(20))


@pytest.mark.parametrize(("rank", "kept"), [(0, 3), (1, 2), (2, 0)])
def test_the_padding_of_a_shard_is_not_part_of_it(monkeypatch, rank, kept):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    parameter = SimpleNamespace(ds_tensor=torch.zeros(3), ds_numel=5, ds_process_group=None)
    assert without_padding(parameter, torch.tensor([1.0, 1.0, NAN])).tolist()[:2] == [1.0, 1.0][:kept]
    assert len(without_padding(parameter, torch.zeros(3))) == kept


def test_nonfinite_entries_are_counted_and_left_out_of_norm_and_max(monkeypatch):
    monkeypatch.setattr(report, "CHUNK", 2)
    assert report.measure(torch.tensor([3.0, NAN, -4.0, INF, 0.0])).tolist() == [25.0, 4.0, 2.0]
    assert report.measure(torch.tensor([NAN])).tolist() == [0.0, 0.0, 1.0]
    assert report.measure(torch.zeros(0)).tolist() == [0.0, 0.0, 0.0]
    huge = torch.full((5,), 3e38)
    assert report.measure(huge)[0].sqrt().item() == pytest.approx(5**0.5 * 3e38)


def test_a_report_that_cannot_be_written_does_not_hide_the_fault(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_durably", full)
    monkeypatch.setattr(
        report, "look", lambda engine: (["a"], ["decay"], torch.tensor([[[[1.0, 1.0, 2.0], [1.0, 1.0, 0.0]]]]))
    )
    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    event = report.Event(Progress(6), stages_of(run)[-1], "said", 1.0, ["loss/total"], torch.ones(1, 1))
    said = report.write_report(None, event)
    assert said.startswith("the first gradient that is not finite is a of rank 0; no report (")
    assert said.endswith("step_00000007.json: No space left on device)")


def test_a_term_that_begins_in_mid_stage_is_no_spike(tmp_path, monkeypatch):
    """The layer loss alone is far below the loss of which next-token prediction is a part."""
    at = World(tmp_path, monkeypatch, spike_window=4)
    loss = at.run.loss.model_copy(update={"ce": Schedule(start=1, on_after=0.5)})
    stage = stages_of(at.run.model_copy(update={"loss": loss}))[-1]
    at.guard.stage, half = stage, stage.steps // 2
    for step in range(stage.steps):
        at.step(0.5 if step < half else 9.0)
    assert at.alerts == [] and spikes.state_of(at.progress).losses == [9.0] * (stage.steps - half)
