"""The estimate of a rank's memory: its terms against real models, its activations against those of a forward."""

import gc
import json

import pytest
import torch
from plain import build, make_batch, make_world
from tiny import make_run

from ted_scale.distill import memory
from ted_scale.distill.normalization import count_for_teacher
from ted_scale.distill.signal import Weights
from ted_scale.models import quantized
from ted_scale.models.anatomy import run_body
from ted_scale.models.engine_config import KEPT_WHOLE, setting, teacher_config
from ted_scale.models.weights import build_network
from ted_scale.plan import make_plan
from tools.bench.memory import peak_bytes

NAMES = ("head_bias", "softcap", "logit_scale")
WHOLE = {"stage": 3, "stage3_param_persistence_threshold": 10**15}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def of(world, stage: int = -1, ranks: int = 1, device: str = "cpu", **sections):
    plan = make_plan(make_run(world, **sections), ranks)
    return plan, *memory.terms(plan, plan.stages[stage], device)


def test_memory_of_parameters_is_divided_by_the_ranks_and_includes_the_teacher(world):
    """An earlier version counted only the student's state: 0.69 GiB of 3.8."""
    plan, one, _ = of(world, method="kd")
    plan_of_two, two, _ = of(world, method="kd", ranks=2)
    student, teacher = plan.student.parameters, plan.teacher.parameters
    assert (one["weights"], one["teacher"]) == (4 * student, 4 * teacher)
    assert (one["masters"], one["moments"], one["gradients"]) == (4 * student, 8 * student, 4 * student)
    assert all(two[name] == one[name] / 2 for name in ("weights", "teacher", "masters", "moments", "gradients"))
    gathered = [memory.gathered(each, each.stages[-1], "cpu") for each in (plan, plan_of_two)]
    assert gathered[0] == 0 and gathered[1] >= student


def test_a_teacher_that_every_rank_has_whole_is_not_divided_and_not_gathered(world):
    plan, sharded, _ = of(world, method="kd", ranks=4)
    plan_of_whole, whole, _ = of(world, method="kd", ranks=4, teacher={"placement": "replicated"})
    assert whole["teacher"] == 4 * plan.teacher.parameters == 4 * sharded["teacher"]
    gathered = [memory.gathered(each, each.stages[-1], "cpu") for each in (plan_of_whole, plan)]
    assert gathered[0] == plan.student.parameters < gathered[1]


def test_of_a_streamed_teacher_two_blocks_are_on_the_device_and_all_on_the_host(world):
    plan, on_gpu, away = of(world, method="kd", device="cuda", teacher={"placement": "offload"})
    _, on_cpu, nothing = of(world, method="kd", teacher={"placement": "offload"})
    a = plan.teacher
    assert away == 4 * a.layers * a.block_parameters and nothing == 0
    assert on_gpu["teacher"] + away == on_cpu["teacher"] == 4 * (a.parameters + 2 * a.block_parameters)


def test_a_teacher_of_8_bits_counts_a_byte_for_each_element_that_is_rounded(world):
    pytest.importorskip("torchao")
    train = {"precision": "bf16"}
    plan, whole, _ = of(world, method="kd", train=train, teacher={"placement": "replicated"})
    _, small, _ = of(world, method="kd", train=train, teacher={"placement": "replicated", "precision": "int8"})
    counts = quantized.counts(plan.teacher, "int8")
    assert small["teacher"] == counts.bytes < whole["teacher"] - 0.8 * counts.elements
    assert {name: size for name, size in small.items() if name != "teacher"} == {
        name: size for name, size in whole.items() if name != "teacher"
    }


def test_a_call_keeps_a_signal_for_each_micro_batch_and_an_early_one_is_there_in_backward(world):
    """Of a step of eight micro-batches. One call for all of them has no backward to run beside."""

    def kd(early: bool, micro_batch: int, mode: str = "chunked"):
        teacher = {"placement": "replicated", "early": early, "micro_batch": micro_batch}
        plan = of(world, method="kd", teacher=teacher, loss={"mode": mode})[0]
        return memory.moments(plan, plan.stages[-1], "cpu")

    plan, *_ = of(world, method="kd")
    block = 32 * memory.kept_a_token(plan.teacher, torch.float32) / plan.teacher.layers
    head = 32 * 4 * 48
    for n in (1, 2, 20):
        signals, serial, early = min(n, 8), kd(False, n), kd(True, n)
        assert serial[0]["states"] == early[0]["states"] == signals * head
        assert serial[0]["activations"] == early[0]["activations"] == pytest.approx(signals * block)
        assert {moment["read ahead"] for moment in serial[2:4]} == {0}
        ahead = signals * (block + head) if signals < 8 else 0
        assert [moment["read ahead"] for moment in early[2:4]] == pytest.approx([ahead] * 2)
    assert kd(True, 1, "strict")[2]["read ahead"] == pytest.approx(block + 2 * head)


def test_stage_one_trains_filters_alone(world):
    plan, first, _ = of(world, 0)
    _, second, _ = of(world, 1)
    filters = sum(memory.filter_parameters(plan).values())
    assert first["moments"] == 8 * filters < second["moments"]
    assert memory.states(plan, plan.stages[0]) > memory.states(plan, plan.stages[1])
    assert memory.activations(plan, plan.stages[0])[0] == 0 < memory.activations(plan, plan.stages[1])[0]
    _, heads, _ = of(world, 0, filters={"head": "per_layer"})
    assert heads["moments"] == 8 * (filters + 2 * (48 + 1) * (128 + 128))


def test_a_model_is_tried_once_for_all_stages(world, monkeypatch):
    """A trial of a deep model takes half a second, and there were two of each."""
    memory.kept_a_token.cache_clear()
    tried, build = [], memory.hollow
    monkeypatch.setattr(memory, "hollow", lambda anatomy, dtype: tried.append(anatomy) or build(anatomy, dtype))
    assert len(memory.describe(make_plan(make_run(world), 1))) == 2
    assert [anatomy.family for anatomy in tried] == ["gpt2", "llama"]


def test_offloaded_state_does_not_count_for_the_device_and_a_bucket_does(world, tmp_path):
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "contiguous_gradients": True,
        "reduce_bucket_size": "100000000",  # DeepSpeed takes a string for a number
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    plan, here, away = of(world, device="cuda", ds_config=str(tmp_path / "ds.json"))
    assert not here.keys() & {"masters", "moments"} and away > 12 * plan.student.parameters
    assert here["reduction"] > 4 * 1e8


def test_gradients_that_wait_for_the_end_of_a_step_are_whole_on_every_rank(world):
    """Until the update; a single rank has no more of them."""
    train = {"reduce_once": True}
    plan, each, _ = of(world, method="ce", ranks=4)
    _, once, _ = of(world, method="ce", ranks=4, train=train)
    assert once["whole gradients"] == 4 * plan.student.parameters and not each["whole gradients"]
    assert not of(world, method="ce", train=train)[1]["whole gradients"]


def test_a_student_that_stays_whole_is_so_in_the_update_too(world, tmp_path):
    (tmp_path / "whole.json").write_text(json.dumps({"zero_optimization": WHOLE}))
    plan, _, _ = of(world, method="ce", ranks=4, ds_config=str(tmp_path / "whole.json"))
    stage = plan.stages[-1]
    each = [moment.get("gathered") for moment in memory.moments(plan, stage, "cpu")]
    assert each == [4 * plan.student.parameters] * 5
    shared, _, _ = of(world, method="ce", ranks=4)
    assert memory.moments(shared, stage, "cpu")[-1]["gathered"] == 0


@pytest.mark.parametrize(("asked", "kept"), [("1000000000000000", 10**5), (10**15, 10**5), (0, 0)])
def test_a_ds_config_that_keeps_the_student_whole_leaves_a_sharded_teacher_in_parts(world, tmp_path, asked, kept):
    """DeepSpeed reads numbers in strings, too."""
    zero = {"stage": 3, KEPT_WHOLE: asked}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    plan, _, _ = of(world, method="kd", ranks=4, ds_config=str(tmp_path / "ds.json"))
    assert teacher_config(plan)["zero_optimization"][KEPT_WHOLE] == kept
    assert memory.keeps_student_whole(plan, "cpu") is (kept > 0)


@pytest.mark.parametrize(
    ("own", "on_cpu", "on_cuda"),
    [({"divergence": "jsd"}, 2, 0), ({"divergence": "reverse"}, 0, 0), ({"top_k": 8}, 1, 1)],
    ids=str,
)
def test_a_divergence_may_take_more_matrices_of_a_chunk_where_torch_computes_it(world, own, on_cpu, on_cuda):
    for device, more in (("cpu", on_cpu), ("cuda", on_cuda)):
        plans = [of(world, loss={"chunk_tokens": 16, **x})[0] for x in ({}, own)]
        kl, other = (memory.chunk(plan, plan.stages[-1], device) for plan in plans)
        of_torch = "top_k" in own and device == "cuda"  # a softmax beside the logits, which the kernel does without
        assert other - kl == (more + of_torch) * 16 * 4 * 128


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_activations_are_what_a_forward_s_graph_keeps(world, side):
    anatomy = getattr(make_plan(make_run(world), 1), side)
    network = build_network(anatomy, ds_config=None, dtype=torch.float32)
    weights, kept = {p.data_ptr() for p in network.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_body(network, anatomy, torch.zeros(2, 64, dtype=torch.long))
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights) / 128
    assert memory.kept_a_token(anatomy, torch.float32) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("method", ["ce", "kd", "ted"])
def test_the_most_that_a_forward_has_is_the_moment_of_its_loss(world, method):
    """Counted tensors of student, teacher and losses without DeepSpeed, beside what the plan says of that moment."""
    moment, counted = moment_and_count(world, method=method)
    assert moment == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_a_text_with_a_pass_of_its_own_keeps_a_second_gradient_of_the_head_until_the_backward(world, mode):
    """Strict mode forms none in the forward."""
    targets, both = (
        moment_and_count(world, method="kd", loss={"mode": mode, "tokens": tokens}) for tokens in ("targets", "all")
    )
    planned, counted = both[0] - targets[0], both[1] - targets[1]
    assert planned == (4 * 32 * (128 + 1024) if mode == "chunked" else 0)  # its width, vocabulary and tokens
    assert counted == pytest.approx(planned, abs=0.15 * 4 * 32 * (128 + 1024))


def test_a_run_without_a_teacher_has_one_pass_whatever_its_teacher_would_count(world):
    plans = [of(world, method="ce", loss={"tokens": tokens})[0] for tokens in ("all", "targets")]
    assert memory.of_logits(plans[0], plans[0].stages[-1]) == memory.of_logits(plans[1], plans[1].stages[-1])


def moment_and_count(world, **sections) -> tuple[float, int]:
    """(what the plan says of the moment of a loss, the most bytes that a forward had); half of the tokens are prompts."""
    parts = build(world, train={"micro_batch": 32, "tokens_per_step": 1024}, **sections)
    weights, batch = parts.stage.weights(parts.stage.first_step), make_batch(32, 32)
    batch = batch._replace(weights_BT=batch.weights_BT * (torch.arange(32) % 2))
    denom_t = count_for_teacher(parts.plan.run.loss, [batch])

    def forward():
        signal = parts.teacher(batch, weights) if parts.teacher else None
        return parts.student(batch, signal, weights, torch.tensor(1024.0), denom_t).total

    forward()
    gc.collect()  # else what an earlier test left may be freed in between
    return sum(memory.moments(parts.plan, parts.stage, "cpu")[1].values()), peak_bytes(forward)


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_vitals_take_is_what_a_measurement_takes(world, every, precision):
    """Counted tensors of a part of the output and of a pair. A softcap or a divergence would take half as much again."""
    train = {"micro_batch": 32, "tokens_per_step": 1024, "precision": precision}
    parts = build(world, vitals={"every": every}, train=train, filters={"steps": 0})
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    plan, vitals, weights, batch = parts.plan, parts.student.vitals, Weights(1.0, 1.0, 1.0), make_batch(32, 32)

    def random(*shape):
        return torch.randn(*shape, dtype=dtype)

    h_s, h_t = random(1024, plan.student.head_width), random(1024, plan.teacher.head_width)
    w_s, w_t = random(128, plan.student.head_width), random(128, plan.teacher.head_width)
    settings = {f"{name}_{side}": 1.0 if name == "logit_scale" else None for name in NAMES for side in "st"}
    student, teacher = ((h, random(plan.width, h.shape[1]), None) for h in (h_s, h_t))
    taken = {}
    for name, item, call in (
        ("output", -1, lambda: vitals.output(h_s, w_s, h_t, w_t, settings, weights)),
        ("pair", 0, lambda: vitals.pair(0, h_s, student, teacher)),
    ):
        vitals.begin(0)
        vitals.waiting = [item] if every == 100 else vitals.items
        vitals.open(batch, weights)
        call()
        taken[name] = peak_bytes(call)
    found = [moment["vitals"] for moment in memory.moments(plan, parts.stage, "cpu") if "vitals" in moment]
    assert len(found) == 2 and found[0] / 2 < taken["output"] <= found[0] and 0.8 * found[1] < taken["pair"] <= found[1]


def test_terms_are_what_rests_and_the_moment_that_needs_most(world):
    plan, found, _ = of(world, device="cuda")
    rest, moments = (part(plan, plan.stages[-1], "cuda") for part in (memory.resting, memory.moments))
    assert sum(found.values()) == sum(rest.values()) + max(sum(moment.values()) for moment in moments)


def test_a_plan_for_a_gpu_has_its_sizes_also_where_there_is_none(world):
    """Sub-groups of a CPU are a 24th of a GPU's: a plan for a cluster was made with them."""
    plan, _, _ = of(world)
    assert setting(plan, "sub_group_size", "cuda") == 10**8 > setting(plan, "sub_group_size", "cpu")


def test_checkpointing_lowers_the_activations_and_the_line_lists_all_terms(world):
    (whole, _, _), (plan, checkpointed, _) = (of(world, student={"gradient_checkpointing": on}) for on in (False, True))
    kept, again = (memory.activations(each, each.stages[-1]) for each in (whole, plan))
    assert sum(again[:2]) < sum(kept[:2])
    line = memory.describe(plan)[-1]
    assert line.startswith("memory a rank in stage student, estimated for c") and all(
        f"{n} " in line for n, size in checkpointed.items() if size
    )
