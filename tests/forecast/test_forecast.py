"""A machine in numbers, what a pass reads and writes, what ranks send each other, and the time that follows from them."""

import json
from dataclasses import replace

import pytest
import torch
from plain import make_world
from tiny import make_run

from ted_scale.base.errors import UserError
from ted_scale.distill import memory
from ted_scale.distill.filter_sizes import filter_parameters
from ted_scale.distill.filters import keeps_filtered
from ted_scale.forecast import machine as machines
from ted_scale.forecast import step, summary, traffic
from ted_scale.forecast.placement import Rank, place
from ted_scale.forecast.work import passes
from ted_scale.plan import plan_of_models

H100 = machines.named("h100", "bf16")
BAD = [
    ("memory", "x"),
    ("products", 0),
    ("device", 5),
    ("ranks", -1),
    ("call", True),
    ("copies", float("inf")),
    ("name", 1),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world, ranks: int = 4, *, way: str = "replicated", local: int = 2, **sections):
    sections = {"method": "kd", "teacher": {"placement": way}, "train": {"tokens_per_step": 512}, **sections}
    plan = plan_of_models(make_run(world, **sections), ranks, needs_weights=False)
    return replace(plan, placement=place(plan, Rank("cuda", 1e12, local)))


def seconds(plan, machine=H100, local: int = 2) -> dict[str, float]:
    return step.seconds(plan, plan.stages[-1], plan.stages[-1].first_step, machine, local)


def test_a_device_is_its_sheet_times_the_shares(world):
    assert (H100.peak, H100.device) == (989e12, "cuda") and H100.products == 0.79 * 989e12
    assert machines.named("H100", "fp32").products == 0.79 * 67e12
    assert machines.of_torch_name("NVIDIA H100 80GB HBM3", "bf16") == H100
    assert machines.of_torch_name("NVIDIA H100 PCIe", "bf16") is None  # another card, with another peak
    assert machines.of_torch_name("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None


def test_a_device_that_is_not_in_the_table_is_refused():
    with pytest.raises(
        UserError, match=r"^--gpu must be one of a100, h100, h200, b200, mi300x, but is 'v100'; or calibrate"
    ):
        machines.named("v100", "bf16")


def test_a_calibration_is_read_as_it_was_written_and_damage_is_a_sentence(tmp_path):
    machines.write(tmp_path / "runs" / "machine.json", H100)
    assert machines.read(tmp_path / "runs" / "machine.json") == H100
    for damage in ("{", '{"name": "x"}', "[]", *(json.dumps(H100._asdict() | {key: bad}) for key, bad in BAD)):
        (tmp_path / "damaged.json").write_text(damage)
        with pytest.raises(
            UserError, match=r"damaged.json must hold a machine as ted-scale plan --calibrate writes it"
        ):
            machines.read(tmp_path / "damaged.json")
    machines.write(tmp_path / "cpu.json", H100._replace(peak=None, latency=0.0, device="cpu", ranks=1))
    assert machines.read(tmp_path / "cpu.json").peak is None


def test_a_calibration_serves_its_precision_and_several_ranks_only_if_several_measured():
    alone = H100._replace(ranks=1)
    assert machines.unfit(alone, "bf16", 1) is machines.unfit(alone._replace(ranks=2), "bf16", 64) is None
    assert machines.unfit(H100, "bf16", 64) is None
    assert machines.unfit(alone, "fp32", 1).startswith(
        "train.precision must be that of the calibration ('bf16'), but is 'fp32'"
    )
    assert machines.unfit(alone, "bf16", 8).startswith("--gpus must be 1 with a calibration by one rank")


def test_between_two_products_a_compiled_block_reads_and_writes_what_they_do(world):
    """Of a llama with grouped heads: q, k, v, o, gate, up, down."""
    a = plan_of(world).teacher
    d, kv, hidden = 48, 24, 64
    inputs, outputs = 5 * d + d + hidden, (d + 2 * kv) + d + 2 * hidden + d
    for dtype, b in ((torch.float32, 4), (torch.bfloat16, 2)):
        products, found = a.layers * b * (inputs + outputs), passes(a, dtype)
        rotary = 28  # bytes: transformers 5.17 multiplies positions and frequencies as matrices, once for all blocks
        assert found.forward.fused - products in (0, rotary) and found.backward.fused == 2 * products


def test_what_operations_touch_grows_with_blocks_and_shrinks_with_their_type(world):
    whole = passes(plan_of(world).teacher, torch.float32)
    half = passes(plan_of(world).teacher, torch.bfloat16)
    assert half.forward.eager < whole.forward.eager < whole.backward.eager
    assert whole.forward.eager > whole.forward.fused and whole.forward.calls > 10 * plan_of(world).teacher.layers


def test_a_teacher_that_a_rank_has_whole_is_sent_to_nobody(world):
    plans = {way: plan_of(world, way=way) for way in ("replicated", "node", "sharded", "offload")}
    sent = {way: traffic.teacher_gathers(plan, 4) for way, plan in plans.items()}
    assert sent["replicated"].bytes == sent["offload"].bytes == 0
    assert sent["node"].bytes == sent["sharded"].bytes == 4 * plans["node"].teacher.parameters
    assert (sent["node"].ranks, sent["sharded"].ranks) == (2, 4)


def test_a_group_within_a_node_does_not_wait_for_the_network():
    sent, slow = traffic.Sent(1e9, 1, 8), H100._replace(far_link=1.0)
    assert traffic.seconds(sent, slow, 8) == traffic.seconds(sent, H100, 8)
    assert traffic.seconds(sent, slow, 4) > 1e6 * traffic.seconds(sent, H100, 4)
    assert traffic.seconds(sent._replace(ranks=1), slow, 4) == 0


def test_the_network_of_a_node_is_shared_by_its_ranks():
    """Eight ranks bring eight cards: the same bytes arrive in an eighth of the time."""
    sent, machine = traffic.Sent(1e9, 0, 64), H100._replace(node_link=1e15)
    assert traffic.seconds(sent, machine, 8) == pytest.approx(1e9 * 7 / 8 / (8 * machine.far_link))


def test_student_weights_beyond_the_live_limit_are_gathered_twice(world, tmp_path):
    plan = plan_of(world)
    once = traffic.student_gathers(plan, plan.stages[-1], 2, "cuda")
    nothing = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": nothing}))
    twice = plan_of(world, ds_config=str(tmp_path / "ds.json"))
    assert traffic.student_gathers(twice, twice.stages[-1], 2, "cuda").bytes == 2 * once.bytes


def test_gradients_that_are_sent_in_bf16_are_half_the_bytes_and_those_of_a_step_are_sent_once(world, tmp_path):
    (tmp_path / "ds.json").write_text('{"communication_data_type": "bf16", "zero_optimization": {"stage": 3}}')
    train = {"tokens_per_step": 512, "reduce_once": True}
    plan, half, once = plan_of(world), plan_of(world, ds_config=str(tmp_path / "ds.json")), plan_of(world, train=train)
    fp32, bf16, a_step = (traffic.reduction(one, one.stages[-1], 1e6, "cuda").bytes for one in (plan, half, once))
    assert (fp32, bf16, a_step) == (4e6, 2e6, 4e6 / once.accumulation) and once.accumulation > 1


def test_terms_are_there_if_their_losses_are(world):
    ce, kd, ted = (seconds(plan_of(world, method=method)) for method in ("ce", "kd", "ted"))
    assert (ce["teacher"], kd["layer loss"]) == (0, 0) and kd["teacher"] > 0 and ted["layer loss"] > 0
    assert ce["student"] == kd["student"] == ted["student"] and ce["head"] < kd["head"] == ted["head"]


def test_a_teacher_that_is_asked_half_as_often_costs_half(world):
    always, half = (seconds(plan_of(world, teacher={"placement": "sharded", "every": every})) for every in (1, 2))
    assert half["teacher"] == pytest.approx(always["teacher"] / 2)
    assert half["student"] == always["student"]


def test_a_teacher_that_reads_two_micro_batches_in_a_call_is_gathered_copied_and_called_half_as_often(world):
    hosts = H100._replace(call=1e-3), H100._replace(host_link=1.0)
    for machine, way, term in ((hosts[0], "sharded", "teacher"), (hosts[1], "offload", "teacher")):
        once, twice = (
            seconds(plan_of(world, teacher={"placement": way, "micro_batch": n}), machine)[term] for n in (1, 2)
        )
        assert twice == pytest.approx(once / 2), way
    slow = H100._replace(far_link=1.0, call=0.0)
    once, twice = (
        seconds(plan_of(world, teacher={"placement": "sharded", "micro_batch": n}), slow)["gathers"] for n in (1, 2)
    )
    whole = seconds(plan_of(world), slow)["gathers"]
    assert twice - whole == pytest.approx((once - whole) / 2)


def test_of_an_odd_number_of_micro_batches_the_last_call_reads_one(world):
    plan = plan_of(world, train={"tokens_per_step": 3 * 128}, teacher={"placement": "sharded", "micro_batch": 2})
    assert plan.accumulation == 3 and step.calls_of_teacher(plan, plan.stages[-1]) == pytest.approx(2 / 3)
    plan = plan_of(
        world, train={"tokens_per_step": 3 * 128}, teacher={"placement": "sharded", "micro_batch": 2, "every": 3}
    )
    assert step.calls_of_teacher(plan, plan.stages[-1]) == 1


def test_a_teacher_that_is_compiled_by_itself_has_compiled_blocks(world):
    plan = plan_of(world, teacher={"placement": "auto", "compile": True}, fused_blocks="off")
    assert step.fuses(plan, "teacher", "cpu") and not step.fuses(plan, "student", "cuda")


def test_the_time_of_a_teacher_of_8_bits_is_said_to_be_that_of_bf16(world):
    run = plan_of(world).run
    assert summary.uncounted(plan_of(world)) == []
    bits = replace(
        plan_of(world), run=run.model_copy(update={"teacher": run.teacher.model_copy(update={"precision": "int8"})})
    )
    assert summary.uncounted(bits) == [
        "the teacher's time is that of bf16: products in int8 have no rate of their own here"
    ]


def test_filters_that_a_rank_has_whole_are_neither_gathered_nor_offloaded(world, tmp_path):
    """Of a narrow width; in stage I all are gathered, with their lifts."""
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    plan = plan_of(world, method="ted", filters={"width": 8}, ds_config=str(tmp_path / "ds.json"))
    counts, (first, last) = filter_parameters(plan), plan.stages
    assert keeps_filtered(plan, last) and counts["lifts"]
    assert memory.filters_by_place(plan, first) == (sum(counts.values()), 0)
    assert memory.filters_by_place(plan, last) == (counts["student"], counts["teacher"])
    bare = replace(plan, pairs=[])
    more = traffic.student_gathers(plan, last, 4, "cuda").bytes - traffic.student_gathers(bare, last, 4, "cuda").bytes
    assert more == 4 * counts["student"]
    assert memory.terms(plan, last, "cuda")[0]["filters"] == 4 * counts["teacher"]
    assert memory.terms(plan, first, "cuda")[0]["filters"] == 0


def test_every_rate_matters_and_a_better_one_never_costs_time(world):
    plans = [plan_of(world, way=way, method="ted", local=2) for way in ("sharded", "offload")]
    slow = H100._replace(overlap=0.0, call=0.0)
    for rate in ("products", "attention", "head", "layer", "copies", "update", "far_link", "host_link"):
        faster = slow._replace(**{rate: 10 * getattr(slow, rate)})
        before, after = (sum(sum(seconds(plan, m).values()) for plan in plans) for m in (slow, faster))
        assert after < before, rate


def test_what_computes_beside_it_hides_a_communication(world):
    plan = plan_of(world, way="sharded")
    shown, hidden = (seconds(plan, H100._replace(overlap=share, call=0.01))["gathers"] for share in (0.0, 1.0))
    assert shown > hidden == 0


def test_on_cpu_ranks_no_backward_hides_a_reduction(world):
    plan, slow = plan_of(world), H100._replace(far_link=1e6, call=0.01, overlap=1.0)
    gpu, cpu = (seconds(plan, slow._replace(device=device))["reduction"] for device in ("cuda", "cpu"))
    alone = seconds(plan, slow._replace(device="cpu", overlap=0.0))["reduction"]
    assert cpu == alone > gpu


def test_micro_batches_are_counted_and_the_update_once(world):
    one, two = (seconds(plan_of(world, train={"tokens_per_step": size})) for size in (512, 1024))
    assert one.pop("optimizer") == two.pop("optimizer")
    assert all(two[name] == pytest.approx(2 * one[name]) for name in one)


def test_a_whole_run_is_its_stages_and_its_utilization_is_below_one(world):
    plan = plan_of(world, method="ted")
    found = [summary.of_stage(plan, stage, H100, 2) for stage in plan.stages]
    assert [one.days * 86400 for one in found] == pytest.approx(
        [s.steps * sum(one.seconds.values()) for s, one in zip(plan.stages, found, strict=True)]
    )
    assert all(0 < one.mfu < 1 for one in found)


def test_without_a_machine_the_forecast_says_how_to_get_one(world, tmp_path, monkeypatch):
    plan = plan_of(world, runs=str(tmp_path))
    [line] = summary.describe(plan)
    assert line.startswith("time of a step: no forecast") and "--calibrate" in line
    assert summary.numbers(plan, plan.stages[-1], 4, "cpu").keys() == {"memory/forecast_gib"}
    machines.write(tmp_path / "machine.json", H100._replace(device="cpu", source="calibrated, 1 rank", ranks=1))
    [line] = summary.describe(plan)
    assert line.startswith("time of a step: no forecast") and "precision" in line
    kept = H100._replace(device="cpu", source="calibrated, 4 ranks", ranks=4, precision="fp32")
    machines.write(tmp_path / "machine.json", kept)
    [line] = summary.describe(plan)[-1:]
    assert line.startswith("time of a step in stage student, forecast for h100 (calibrated, 4 ranks): ")
    assert summary.numbers(plan, plan.stages[-1], 4, "cpu").keys() == {"memory/forecast_gib", "perf/forecast_ms"}


def test_no_run_ends_because_of_its_forecast(world, tmp_path, caplog):
    """A damaged machine.json is a sentence of the dry run; of a run it is a warning."""
    plan = plan_of(world)
    plan = replace(plan, run=plan.run.model_copy(update={"runs": str(tmp_path)}))
    assert summary.numbers(plan, plan.stages[-1], 0, "cpu")["memory/forecast_gib"] > 0
    (tmp_path / machines.FILE).write_text("{")
    assert summary.numbers(plan, plan.stages[-1], 0, "cpu").keys() == {"memory/forecast_gib"}
    assert "no forecast of this stage: " in caplog.text
    with pytest.raises(UserError, match=machines.FILE):
        summary.describe(plan)
