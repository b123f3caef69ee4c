"""States that the teacher's filters read as they appear: the same losses to the last bit, and only narrow ones are kept."""

import pytest
import torch
from plain import build, make_batch, make_shard, make_world, run_step
from tiny import make_model, make_run

from ted_scale.distill import memory
from ted_scale.distill.filters import keeps_filtered
from ted_scale.distill.signal import Weights
from ted_scale.engines import lend, take_back
from ted_scale.health import replicas
from ted_scale.kernels import filtered_mse, filtered_states
from ted_scale.kernels.formulas.layers import KINDS
from ted_scale.plan import make_plan
from tools.bench.memory import peak_bytes

ON = Weights(ce=0.5, kl=2.0, layer=3.0)
NARROW = {"width": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Eight pairs of blocks; the teacher's states are twelve times as wide as the filters, and a block needs less than they."""
    root = tmp_path_factory.mktemp("deep")
    make_model(root / "teacher", "llama", hidden_size=192, intermediate_size=64, num_hidden_layers=8)
    make_model(root / "student", "gpt2", num_hidden_layers=8, seed=1)
    make_shard(root / "corpus")
    return root


def streamed(parts):
    """The same parts, with the teacher's filters lent to the teacher."""
    parts.teacher.keep_filtered(parts.student.filters_t)
    parts.student.filters_t = None
    return parts


@pytest.mark.parametrize("sections", [{}, {"filters": {"mlp": 8}}, {"loss": {"kind": "cosine"}}], ids=str)
def test_losses_and_gradients_are_the_same_to_the_last_bit(world, sections):
    sections = {**sections, "filters": {**NARROW, **sections.get("filters", {})}}
    batch = make_batch(documents=True)
    (kept,), gradients = run_step(build(world, **sections), [batch], ON)
    (early,), again = run_step(streamed(build(world, **sections)), [batch], ON)
    assert all(torch.equal(a, b) for a, b in zip(kept[:5], early[:5], strict=True)) and kept.layer > 0
    assert gradients.keys() == again.keys() and all(torch.equal(g, again[n]) for n, g in gradients.items())


def test_a_block_of_two_pairs_is_filtered_for_each(world):
    sections = {"filters": NARROW, "pairs": {"explicit": [(0, 3), (1, 3)]}}
    (kept,), _ = run_step(build(world, **sections), [make_batch()], ON)
    (early,), _ = run_step(streamed(build(world, **sections)), [make_batch()], ON)
    assert torch.equal(kept.layers, early.layers) and kept.layers[0] != kept.layers[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_s_numbers_are_the_same(kind, dtype):
    """Of several chunks, and with tokens that do not count, whatever stands in them."""
    torch.manual_seed(0)
    h_t, w_t, b_t, h_s, w_s, b_s = (
        torch.randn(*shape).to(dtype) for shape in ((1000, 40), (16, 40), (16,), (1000, 24), (16, 24), (16,))
    )
    weight = (torch.rand(1000) > 0.2).float()
    h_t[weight == 0] = float("nan")
    student = [x.requires_grad_() for x in (h_s, w_s, b_s)]
    values = []
    for teacher in ((h_t, w_t, b_t), (filtered_states(h_t, w_t, b_t), None, None)):
        loss = filtered_mse(*teacher, *student, weight, denom=800, kind=kind)
        values.append([loss.detach(), *torch.autograd.grad(loss, student)])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*values, strict=True))


@pytest.mark.parametrize(
    ("width", "precision", "stage", "filtered"),
    [(16, "fp32", -1, True), (47, "fp32", -1, True), ("full", "fp32", -1, False), (23, "bf16", -1, True),
     (24, "bf16", -1, False), (16, "fp32", 0, False)],
)  # fmt: skip
def test_states_are_filtered_early_where_that_makes_them_smaller(world, width, precision, stage, filtered):
    sections = {"filters": {"width": width}, "train": {"precision": precision}}
    plan = make_plan(make_run(world, **sections), 1)
    assert keeps_filtered(plan, plan.stages[stage]) is filtered
    lwd = make_plan(make_run(world, method="lwd", train={"precision": precision}), 1)
    assert not keeps_filtered(lwd, lwd.stages[-1])


@pytest.mark.parametrize("width", [16, "full"])
def test_the_estimate_of_what_a_signal_holds_is_what_it_holds(deep, width):
    parts, batch = build(deep, filters={"width": width}, train={"micro_batch": 4}, data={"seq_len": 16}), make_batch()
    signal = (streamed(parts) if width == 16 else parts).teacher(batch, ON)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*signal.layers_NE, signal.last_NE)}
    expected = memory.states(parts.plan, parts.stage)
    assert sum(held.values()) == expected == 64 * 4 * (8 * (192 if width == "full" else 16) + 192)


def test_no_state_is_held_beyond_its_block(deep):
    """The measured peak of a call, in its last block: seven filtered states and the block's input instead of seven states."""
    parts, batch = build(deep, filters=NARROW), make_batch(rows=16, length=64)
    parts.teacher(batch, ON)
    whole = peak_bytes(lambda: parts.teacher(batch, ON))
    narrow = peak_bytes(lambda: streamed(parts).teacher(batch, ON))
    state, kept = 1024 * 192 * 4, 1024 * 16 * 4
    assert whole - narrow == pytest.approx(6 * state - 7 * kept, rel=0.02)


def test_what_was_lent_is_taken_back(world):
    """By a run that goes back from stage II to stage I: its teacher gives whole states, and none of its digests is missed."""
    parts, batch = build(world, filters=NARROW), make_batch()
    teacher = parts.teacher
    teacher.at_load = before = replicas.digests(replicas.parts_of(teacher.body), torch.device("cpu"))
    whole = teacher(batch, ON).layers_NE
    for _ in range(2):
        lend(parts.student.filters_t, teacher, torch.float32)
        assert teacher(batch, ON).layers_NE[0].shape[-1] == 16 and len(teacher.at_load) == len(
            replicas.frozen_of(teacher)
        )
        take_back(parts.plan, teacher)
        assert torch.equal(teacher.at_load, before) and len(before) == len(replicas.frozen_of(teacher))
        assert all(torch.equal(a, b) for a, b in zip(whole, teacher(batch, ON).layers_NE, strict=True))
