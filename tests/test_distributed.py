"""Two real ZeRO-3 ranks on CPU: the same numbers as one rank and as plain torch, sharding, resume, and what goes
wrong."""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import recorded_losses
import sample_scenarios
import torch
from corpus import steps
from data_scenarios import make_examples
from launching import run_ranks
from number_scenarios import FAR
from places import HARNESS, ROOT
from safetensors.torch import load_file
from scenarios import (
    MIXTURES,
    ON_A_CPU,
    READINGS,
    beside,
    rows,
    sections_for_liger,
    sections_of_families,
    sections_of_mixtures,
    seldom,
)
from tiny import FAMILIES, MORE, make_model, make_run

from ted_scale.checkpoints.folder import newest_checkpoint
from ted_scale.config.run_file import load_run
from ted_scale.distill.trained import trained_parameters
from ted_scale.forecast import traffic
from ted_scale.forecast.placement import Rank, place
from ted_scale.plan import make_plan, plan_of_models

TWO_RANKS = (
    "watched_ten_steps", "resumes", "resumes_with_other_settings", "poisoned_loss", "poisoned_gradient",
    "full_disk", "retried_save", "layer_loss_ends", "loading_memory", "host_reads", "variants",
    "kinds_of_filters", "families", "skips", "rewinds", "flips", "stopped_by_signals", "buffers", "far_positions",
    "traffic", "stage_two_memory", "blocks_by_liger", "without_stage_one", "recorded_runs",
    "blocks_compiled", "asked_seldom", "teacher_moves", "readings", "shipped_configs", "int8_gathers", "mixtures",
    "rows_shared", "families_shared", "deepspeed_attention", "samples_written", "vitals", "every_token", "packed_resumes",
    "best_is_kept", "adapters", "adapters_beside_a_whole_student",
)  # fmt: skip

ONE_RANK = (
    "ten_steps", "all_methods", "kinds_of_filters", "alone", "asked_seldom", "rows_shared", "every_token", "packed_resumes",
    "adapters", "adapters_on_others", "merged",
)  # fmt: skip

SKIPS = ("skips", "skips_offloaded", "skips_once")


def launch(folder: Path, ranks: int, names) -> None:
    run_ranks(ranks, HARNESS / "ranks.py", folder, ",".join(names))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder after both launches."""
    folder = tmp_path_factory.mktemp("ranks")
    recorded_losses.make_inputs(folder)
    make_model(folder / "narrow", "qwen2", num_hidden_layers=2, hidden_size=48, seed=2)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 8192}
    make_model(folder / "large", "llama", max_shard_size="40MB", **sizes)
    for number, family in enumerate(FAMILIES):
        make_model(folder / family, family, num_hidden_layers=2, seed=number)
    for family in MORE:
        make_model(folder / family, family)
    for family in MIXTURES:
        make_model(folder / f"teacher_{family}", family, max_shard_size="40KB")
    one_head = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
    make_model(folder / "far", "llama", max_position_embeddings=FAR, **one_head)
    sample_scenarios.make_speaker(folder / "speaker")
    make_examples(folder)
    launch(folder, 2, TWO_RANKS)
    launch(folder, 4, ("placements", "rows_shared", "deepspeed_attention"))
    launch(folder, 1, ONE_RANK)
    return folder


def result(folder: Path, name: str, rank: int = 0):
    value = json.loads((folder / f"{name}.{rank}.json").read_text())
    assert not (isinstance(value, dict) and "traceback" in value), value["traceback"]
    return value


def losses(folder: Path, name: str) -> list[float]:
    return [row["loss/total"] for row in rows(folder, name) if "loss/total" in row]


def plain_losses(folder: Path, **sections) -> list[float]:
    """The same run without DeepSpeed: the module, AdamW, and a loop of ten lines a stage."""
    from ted_scale.data.stream import open_stream
    from ted_scale.distill.normalization import count_valid
    from ted_scale.distill.student import Student
    from ted_scale.distill.teacher import Teacher, TeacherBody
    from ted_scale.engines import build_filters, parameter_groups
    from ted_scale.models.weights import build_network

    run = make_run(folder, name="plain", **sections)
    plan = make_plan(run, 1)
    body = TeacherBody(
        build_network(plan.teacher, ds_config=None, dtype=torch.float32), plan.teacher, [t for _, t in plan.pairs]
    )
    teacher = Teacher(body, body)
    values, learnt = [], None
    for stage in plan.stages:
        network = build_network(plan.student, ds_config=None, dtype=torch.float32).requires_grad_(
            not stage.learns_filters
        )
        filters_s, filters_t = build_filters(plan, stage)
        if learnt:
            filters_s.load_state_dict(learnt[0])
            filters_t.load_state_dict(learnt[1])
            filters_t.requires_grad_(False)
        sides = {
            "learns_filters": stage.learns_filters,
            "filters_s": filters_s,
            "filters_t": filters_t,
            "head_t": teacher.head,
        }
        student = Student(run, network, plan.student, plan.pairs, **sides).train()
        optimizer = torch.optim.AdamW(
            parameter_groups(run, student), lr=run.train.lr, betas=run.train.betas, eps=run.train.eps
        )
        stream = open_stream(run.data, run.seed, 128)
        each_step = run.train.tokens_per_step // run.data.seq_len
        data = steps(stream, start=0, samples_per_step=each_step, micro_batch=1)
        for step, micros in zip(range(stage.first_step, stage.last_step), data, strict=False):
            each, denom = stage.of_micro_batches(step, len(micros)), count_valid(micros)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * stage.rate(step)
            totals = [student(m, teacher(m, own), own, denom).total for m, own in zip(micros, each, strict=True)]
            sum(totals).backward()
            filters = {id(p) for n, p in student.named_parameters() if n.startswith("filters_")}
            for side in (True, False):
                parts = [p for p in student.parameters() if p.grad is not None and (id(p) in filters) is side]
                torch.nn.utils.clip_grad_norm_(parts, run.train.clip)
            optimizer.step()
            optimizer.zero_grad()
            values.append(sum(t.item() for t in totals))
        learnt = [f.state_dict() for f in (filters_s, filters_t)] if stage.learns_filters else None
    return values


def test_adapters_are_all_that_is_trained_and_ranks_agree(world):
    result(world, "adapters")
    for name in ("lora_1", "lora_2"):
        before, *later = json.loads((world / f"digests_{name}.json").read_text())
        assert before and len(later) == 3 and all(digests == before for digests in later)
    ours, alone = losses(world, "lora_2"), losses(world, "lora_1")
    assert len(ours) == 4 and ours[-1] < ours[0]
    assert max(abs(a - b) for a, b in zip(ours, alone, strict=True)) < 1e-5
    result(world, "adapters_beside_a_whole_student", 1)
    assert losses(world, "lora_whole") == pytest.approx(ours, abs=1e-5)


def test_adapters_go_on_from_a_checkpoint_to_the_bit_and_on_other_ranks(world):
    whole = final_state(world, "lora_2")
    assert {name for name in whole if "filters_s" not in name and "lora_" not in name} == set()
    again = final_state(world, "lora_2_again")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert losses(world, "lora_2_on_1") == pytest.approx(losses(world, "lora_2"), abs=1e-5)


def test_an_export_of_adapters_has_the_losses_of_its_run(world):
    last = [row["val/loss"] for row in rows(world, "lora_2") if "val/loss" in row][-1]
    first = next(row["val/loss"] for row in rows(world, "from_merged") if "val/loss" in row)
    assert first == pytest.approx(last, rel=1e-5)


def test_exported_adapters_are_the_merged_model_in_plain_peft(world):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(model):
        return model.eval()(torch.arange(3, 43).reshape(2, 20)).logits

    base, merged = (AutoModelForCausalLM.from_pretrained(world / name) for name in ("student", "merged"))
    own, expected = logits(base), logits(merged)
    assert (own - expected).abs().max() > 1e-2
    assert torch.allclose(logits(PeftModel.from_pretrained(base, world / "merged" / "adapters")), expected, atol=1e-5)


def final_state(folder: Path, name: str) -> dict:
    """Tensors of the newest checkpoint, by rank and name."""
    checkpoint = newest_checkpoint(folder / "runs" / name)
    files = sorted(checkpoint.glob("rank_*.safetensors"))
    return {f"{file.stem}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def test_every_buffer_of_a_sharded_model_is_the_one_that_transformers_builds(world):
    found = result(world, "buffers")
    assert found["wrong"] == [] and found["count"] == 56


def test_far_positions_are_as_exact_as_bf16_is(world):
    """Rotary frequencies in bf16 were 19 times as far from the fp32 model here."""
    distance = result(world, "far_positions")
    assert distance["ours"] <= 1.1 * distance["theirs"] and distance["theirs"] > 0.01


def test_one_rank_alone_gathers_no_block_and_reduces_nothing_and_no_gradient_is_copied_for_its_norm(world):
    assert result(world, "alone") == {"reductions": 0, "gathers": 0, "norms": ["torch.float32"], "hooks": 0}


def test_blocks_by_liger_have_the_losses_of_plain_torch(world):
    pytest.importorskip("liger_kernel")
    result(world, "blocks_by_liger")
    assert (
        "blocks: student with Liger's kernels, teacher with Liger's kernels"
        in (world / "runs/by_liger/log.txt").read_text()
    )
    ours, plain = losses(world, "by_liger"), plain_losses(world, **sections_for_liger(world))
    assert len(ours) == 2 and ours != plain
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 1e-5


def test_compiled_blocks_have_the_losses_of_others_and_keep_no_released_weight(world):
    found = result(world, "blocks_compiled")
    assert found["graphs"] and found["compiled"][0] > 50 and found["compiled_again"][0] > 50
    assert found["compiled"][1] == found["compiled_again"][1] == 0
    plain = losses(world, "not_compiled")
    assert all(losses(world, name) == pytest.approx(plain, abs=1e-5) for name in ("compiled", "compiled_again"))


def test_two_ranks_one_rank_and_plain_torch_have_the_same_losses(world):
    two, one = losses(world, "ten_2"), losses(world, "ten_1")
    plain = plain_losses(world, filters={"steps": 4}, train={"steps": 6})
    assert len(two) == 10
    assert max(abs(a - b) for a, b in zip(two, one, strict=True)) < 1e-5
    assert max(abs(a - b) for a, b in zip(one, plain, strict=True)) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_teacher_that_is_asked_for_one_micro_batch_in_three_runs_for_no_other(world, ranks):
    """A step has eight micro-batches on one rank and four on two; the ranks of a run are asked for the same ones."""
    micros = 8 // ranks
    found = json.loads((world / f"asked_seldom.{0 if ranks == 1 else 1}.json").read_text())
    assert found == {"stage I": 2 * micros, "stage II": micros}  # of three steps
    ours = losses(world, f"seldom_{ranks}")
    assert len(ours) == 5
    if ranks == 1:
        assert max(abs(a - b) for a, b in zip(ours, plain_losses(world, **seldom(world)), strict=True)) < 1e-5


@pytest.mark.parametrize(("student", "teacher"), beside(sorted(FAMILIES)))
def test_every_family_has_the_losses_of_plain_torch_as_a_sharded_student_and_teacher(world, student, teacher):
    sharded = losses(world, f"family_{student}")
    plain = plain_losses(world, **sections_of_families(world, student, teacher))
    assert len(sharded) == 3
    assert max(abs(a - b) for a, b in zip(sharded, plain, strict=True)) < 1e-5


@pytest.mark.parametrize(("teacher", "place"), MIXTURES.items())
def test_a_teacher_of_experts_that_ranks_share_has_the_losses_of_plain_torch(world, teacher, place):
    """The rows of most experts lie in one rank's shard, those of some in both."""
    result(world, "mixtures")
    sharded = losses(world, f"beside_{teacher}")
    plain = plain_losses(world, **sections_of_mixtures(world, teacher, "replicated"))
    assert len(sharded) == 3
    assert max(abs(a - b) for a, b in zip(sharded, plain, strict=True)) < 1e-5


def test_every_method_has_the_losses_that_were_recorded(world):
    result(world, "recorded_runs")
    recorded, numbers = json.loads(recorded_losses.RECORDED.read_text()), recorded_losses.numbers_of(world)
    assert len(numbers) > 150
    assert recorded_losses.first_difference(recorded["numbers"], numbers, recorded_losses.tolerance(recorded)) is None


def test_the_norms_of_student_and_filters_are_parts_of_the_whole_one(world):
    told = [row for row in rows(world, "ten_2") if "optim/grad_norm" in row]
    assert all("optim/grad_norm_student" not in row for row in told[:4])  # stage I trains filters alone
    for row in told[4:]:
        apart = [row[f"optim/grad_norm_{side}"] for side in ("student", "filters")]
        assert min(apart) > 0 and sum(n * n for n in apart) ** 0.5 == pytest.approx(row["optim/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("method", ["ce", "kd", "lwd"])
def test_every_method_has_the_same_losses_on_one_and_two_ranks(world, method):
    two, one = losses(world, f"recorded_{method}"), losses(world, f"{method}_1")
    assert len(two) == 6
    assert max(abs(a - b) for a, b in zip(two, one, strict=True)) < 1e-5


@pytest.mark.parametrize(
    "number", ["loss/ce", "loss/kl", "loss/layer", "optim/grad_norm_student", "optim/grad_norm_filters"]
)
def test_a_teacher_of_all_tokens_has_the_losses_and_gradients_of_one_rank(world, number):
    two, one = ([row[number] for row in rows(world, f"every_token_{n}") if number in row][-3:] for n in (2, 1))
    assert len(two) == 3 and min(two) > 0
    assert two == pytest.approx(one, rel=1e-5)


def test_no_step_waits_for_its_data(world):
    waits = [r["perf/data_wait_ms"] / r["perf/step_ms"] for r in rows(world, "straight") if "loss/total" in r]
    assert statistics.median(waits) < 0.01


def test_all_methods_start_from_the_same_student_on_the_same_data(world):
    names = ("recorded_ce", "recorded_kd", "recorded_lwd", "ten_2")
    first = {name: next(row["loss/ce"] for row in rows(world, name) if "loss/ce" in row) for name in names}
    assert len({round(v, 5) for v in first.values()}) == 1, first


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_keeps_more_than_its_part(world, rank):
    seen = result(world, "watched_ten_steps", rank)["resident"]
    assert {"teacher built", "student built", "teacher at 9", "student at 9"} <= seen.keys()
    assert max(seen.values()) <= 1 / 2 + 0.05, seen


@pytest.mark.parametrize("step", [3, 4, 6], ids=["stage I", "the switch", "stage II"])
def test_a_resumed_run_has_the_losses_of_a_straight_one_to_the_last_bit(world, step):
    result(world, "resumes")
    straight, resumed = losses(world, "straight"), losses(world, f"from_{step}")
    assert len(straight) == 10
    assert resumed == straight
    straight, resumed = ([r.get("loss/layer_weight") for r in rows(world, run)] for run in ("straight", f"from_{step}"))
    assert len(set(straight)) == 7  # None, and stage II's six
    assert [weight for weight in resumed if weight] == [weight for weight in straight if weight]


def test_a_resumed_run_over_packed_examples_has_the_losses_of_a_straight_one(world):
    """To the last bit on as many ranks, and but for rounding on another number."""
    result(world, "packed_resumes")
    straight, resumed, alone = (losses(world, name) for name in ("packed", "packed_from_3_on_2", "packed_from_3_on_1"))
    assert len(straight) == 6 and len(set(straight)) == 6
    assert resumed == straight
    assert alone[:3] == straight[:3] and alone == pytest.approx(straight, abs=1e-5)


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("replicated", "whole on every rank"),
        ("offload", "in every rank's host memory, and come to the device block by block"),
    ],
)
def test_a_resumed_run_may_have_its_teacher_elsewhere(world, way, sentence):
    result(world, "teacher_moves")
    straight, moved = losses(world, "straight"), losses(world, f"moved_to_{way}")
    assert len(moved) == 10 and moved[:6] == straight[:6]
    assert max(abs(a - b) for a, b in zip(moved, straight, strict=True)) < 1e-5
    said = (world / f"runs/moved_to_{way}/log.txt").read_text()
    assert f"teacher.placement is '{way}' instead of 'sharded' from step 6 on" in said
    assert f"the teacher's weights are {sentence} (teacher.placement)" in said


@pytest.mark.parametrize("name", [name for name in READINGS if name != "one_by_one"])
def test_however_the_teacher_reads_two_ranks_have_the_same_losses(world, name):
    result(world, "readings", 1)
    plain, other = losses(world, "read_one_by_one"), losses(world, f"read_{name}")
    assert len(plain) == 3
    assert other == plain if name == "early" else other == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "steps", "shared"),
    [("documents", 5, "2_by_2"), ("documents", 5, "4_by_2"), ("causal", 3, "2_by_2"), ("causal", 3, "4_by_4")],
)
def test_ranks_that_share_rows_have_the_losses_and_the_weights_of_one_rank(world, name, steps, shared):
    """Four ranks to a row are more than both models have key heads. Filters that start from states are solved for, which enlarges
    rounding."""
    result(world, "rows_shared", int(shared[0]) - 1)
    one, several = (losses(world, f"rows_{name}_{ranks}") for ranks in ("1_by_1", shared))
    assert len(one) == steps and several == pytest.approx(one, abs=1e-5)
    weights, others = (torch.load(world / f"rows_{name}_{ranks}.pt") for ranks in ("1_by_1", shared))
    assert weights.keys() == others.keys()
    for key, tensor in load_file(world / "narrow/model.safetensors").items():
        assert (weights[f"network.{key}"] - tensor).abs().max() > 1e-3
    for key, tensor in weights.items():
        assert (others[key] - tensor).abs().max() < (2e-7 if key.startswith("network.") else 5e-6), key


def test_a_resumed_run_reads_on_in_the_same_order_with_other_ranks_to_a_row(world):
    result(world, "rows_shared", 1)
    straight, apart = losses(world, "rows_documents_2_by_2"), losses(world, "rows_apart")
    assert len(apart) == 5 and apart == pytest.approx(straight, abs=1e-5)
    said = (world / "runs/rows_apart/log.txt").read_text()
    assert "data.sequence_parallel is 1 instead of 2 from step 3 on" in said
    assert "student by tiled and ulysses, teacher by tiled and ulysses" in said
    assert "attention: document on cpu, student by tiled, teacher by tiled" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_token_of_a_shared_row_has_the_output_that_it_has_in_a_whole_row_in_every_family(world, rank):
    found = result(world, "families_shared", rank)
    assert len(found) == 2 + 2 * len(FAMILIES | MORE) and max(found.values()) < 1e-5, found


@pytest.mark.parametrize("rank", range(4))
def test_heads_are_given_for_tokens_as_by_deepspeed_s_class_to_the_last_bit(world, rank):
    assert result(world, "deepspeed_attention", rank) == {"8": True, "1": True}


@pytest.mark.parametrize("way", ["replicated", "node", "offload"])
def test_wherever_the_teacher_is_four_ranks_have_the_same_losses(world, way):
    for rank in range(4):
        result(world, "placements", rank)
    elsewhere, sharded = losses(world, f"traffic_at_{way}"), losses(world, "traffic_at_sharded")
    assert len(elsewhere) == 5
    assert max(abs(a - b) for a, b in zip(elsewhere, sharded, strict=True)) < 1e-5


def test_no_byte_of_the_teacher_crosses_nodes_unless_all_ranks_share_it(world):
    """Past the first step of stage II, in bytes of both its micro-steps; the rest is the student's and of the filters."""
    teacher = 2 * 4 * (128 * 32 + 32 + 2 * 9280)
    for rank in range(4):
        found = result(world, "placements", rank)
        all_bytes, crossed = ({w: sum(steps[-1][k]) for w, steps in found.items()} for k in ("gathered", "crossed"))
        rest = all_bytes["replicated"]
        assert rest > teacher  # the student is as large
        assert all_bytes == {"sharded": rest + teacher, "replicated": rest, "node": rest + teacher, "offload": rest}
        assert crossed == {"sharded": rest + teacher, "replicated": rest, "node": rest, "offload": rest}
        assert all(step["late"] == [] and step["device_waits"] == 0 for steps in found.values() for step in steps[3:])


def test_a_plan_knows_the_bytes_that_ranks_send(world):
    """Of each placement, those that were counted: of the teacher and of all."""
    found = result(world, "placements", 0)
    for way, counted in found.items():
        plan = plan_of_models(load_run(world / f"runs/traffic_at_{way}/run.toml"), 4)
        plan = replace(plan, placement=place(plan, Rank("cpu", 1e12, 2)))
        stage = plan.stages[-1]
        sent = [traffic.teacher_gathers(plan, 4), traffic.student_gathers(plan, stage, 4, "cpu")]
        assert sum(counted[-1]["gathered"]) == plan.accumulation * sum(each.bytes for each in sent)
        trained = trained_parameters(plan, stage)
        assert sum(counted[-1]["reduced"]) == plan.accumulation * traffic.reduction(plan, stage, trained, "cpu").bytes


def test_a_resumed_run_takes_the_rates_of_its_run_file_and_not_the_checkpoint_s(world):
    groups = {group["role"]: group for group in result(world, "resumes_with_other_settings")}
    assert {r["step"]: r["optim/lr"] for r in rows(world, "other_settings") if r["step"] > 1 and "optim/lr" in r} == {
        2: 1e-3, 3: 1e-5, 4: 1e-5
    }  # fmt: skip
    assert {role: (g["peak_lr"], g["weight_decay"]) for role, g in groups.items()} == {
        "decay": (1e-5, 0.7), "plain": (1e-5, 0.0), "filters": (0.5, 0.0)
    }  # fmt: skip
    assert all((list(g["betas"]), g["eps"]) == ([0.5, 0.6], 1e-6) for g in groups.values())


def test_a_non_finite_loss_never_reaches_the_weights(world):
    seen = [result(world, "poisoned_loss", rank) for rank in (0, 1)]
    for each in seen:
        assert "step 7: loss/layer of rank 1 must be finite, but is nan" in each["said"]
        assert each["weights"] == result(world, "watched_ten_steps")["weights"]
    assert newest_checkpoint(world / "runs/poisoned_loss").name == "step_00000006"


def test_a_non_finite_gradient_stops_the_run_that_deepspeed_would_go_on_with(world):
    for rank in (0, 1):
        seen = result(world, "poisoned_gradient", rank)
        assert "step 7: optim/grad_norm" in seen["said"]
        assert seen["weights"] == result(world, "watched_ten_steps")["weights"]


def report(folder: Path, name: str, step: str) -> dict:
    return json.loads((folder / f"runs/{name}/reports/step_{step}.json").read_text(), parse_constant=pytest.fail)


def test_a_stopped_run_tells_whose_loss_it_was(world):
    told, said = report(world, "poisoned_loss", "00000007"), result(world, "poisoned_loss")["said"]
    of_ranks = [row["loss/layer"] for row in told["losses"]]
    assert of_ranks[1] == "nan" and 0 < of_ranks[0] < 2
    assert (told["samples"], told["stage"]) == ({"first": 16, "count": 8}, "student")
    assert told["first_nonfinite"] == {"gradient": None, "weight": None}
    assert f"report: {world}/runs/poisoned_loss/reports/step_00000007.json" in said


def test_a_stopped_run_tells_in_which_tensor_it_began(world):
    told, said = report(world, "poisoned_gradient", "00000007"), result(world, "poisoned_gradient")["said"]
    first = "network.transformer.wte.weight"
    assert told["first_nonfinite"] == {"gradient": {"tensor": first, "rank": 0}, "weight": None}
    assert told["grad_norm"] == "inf"
    assert f"the first gradient that is not finite is {first} of rank 0; report: " in said


@pytest.mark.parametrize("name", SKIPS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_skipped_step_changes_no_weight_no_moment_and_no_count_of_steps(world, name, rank):
    seen = result(world, "skips", rank)
    states = seen[name]
    assert states["2"]["sub_groups"] > 3
    assert states["2"] == states["3"] == states["4"]
    assert len({states[step]["bits"] for step in ("1", "2", "5", "6")}) == 4
    assert set(states["2"]["steps"]) == {2} and set(states["6"]["steps"]) == {4}
    assert seen[f"{name} counted"] == 2
    assert [value > 0 for value in seen[f"{name} left"].values()] == [True, True, False, False, True, True]


@pytest.mark.parametrize("name", SKIPS)
def test_a_skipped_step_spoils_no_number_and_is_counted(world, name):
    text = (world / f"runs/{name}/metrics.jsonl").read_text()
    told = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [row["step"] for row in told if "loss/total" in row] == [1, 2, 5, 6]
    assert [row.get("optim/skipped") for row in told if "optim/lr" in row] == [None, None, 1, 2, 2, 2]
    said = (world / f"runs/{name}/log.txt").read_text()
    assert "step 3: loss/kl of rank 1 must be finite, but is nan; " in said
    assert "its update is dropped, 2 in a row, 2 in all" in said


@pytest.mark.parametrize("name", SKIPS)
def test_the_report_names_the_one_tensor_whose_gradient_is_not_finite(world, name):
    told = report(world, name, "00000004")
    assert told["first_nonfinite"]["gradient"]["tensor"] == "network.transformer.ln_f.bias"
    assert {role: group["gradient"]["nonfinite"] for role, group in told["groups"].items()} == {"decay": 0, "plain": 32}
    sides = [group[side] for group in told["groups"].values() for side in ("gradient", "weight")]
    assert all(side["norm"] >= side["max"] > 0 for side in sides)
    assert all(isinstance(value, float) for row in told["losses"] for key, value in row.items() if key != "rank")


@pytest.mark.parametrize("name", SKIPS)
def test_the_report_s_gradient_is_the_one_before_clipping(world, name):
    told = report(world, name, "00000003")
    norms = [group["gradient"]["norm"] for group in told["groups"].values()]
    assert told["grad_norm"] > told["clip"] == 1.0
    assert sum(n * n for n in norms) ** 0.5 == pytest.approx(told["grad_norm"], rel=1e-5)


def without_clocks(folder: Path, name: str) -> list[dict]:
    """What a run wrote but for what took how long, and for rows of nothing else."""
    clocks = ("perf/", "memory/", "checkpoint/")
    told = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows(folder, name)]
    return [row for row in told if row.keys() - {"step", "tokens"}]


def test_a_loss_spike_sends_the_run_back_and_past_the_samples(world):
    assert result(world, "rewinds")["straight"] == [1, 2, 3, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11, 12]
    told = [row["step"] for row in rows(world, "rewinds") if "loss/total" in row]
    assert told == list(range(1, 13))
    said = (world / "runs/rewinds/log.txt").read_text()
    for sentence in (
        "back to step_00000002 and on with sample 32, rewind 1 of 3",
        "the run goes on: this stage has no checkpoint to go back to yet",
        "back to step_00000008_1 and on with sample 40, rewind 1 of 3",
        "back to step_00000006_1 and on with sample 48, rewind 2 of 3",
    ):
        assert sentence in said
    reports = sorted(path.name for path in (world / "runs/rewinds/reports").iterdir())
    assert reports == [f"step_{x}.json" for x in ("00000004", "00000006", "00000009", "00000009_rewind_1")]


def test_after_it_went_back_a_run_is_the_checkpoint_s_on_other_samples(world):
    there, beside = losses(world, "rewinds"), losses(world, "rewinds_beside")
    assert len(there) == len(beside) == 12
    assert there[6:] == beside[6:]


def test_a_run_killed_after_it_went_back_comes_to_the_same_end(world):
    assert result(world, "rewinds")["killed"] == [7, 8, 7, 7, 8, 9, 10, 11, 12]
    assert without_clocks(world, "rewinds_killed") == without_clocks(world, "rewinds")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (
            "shard",
            "the teacher's network.model.layers.1.mlp.up_proj.weight must hold the bits that were loaded on rank 1",
        ),
        ("teachers", "the teacher's network.model.norm.weight must hold the bits of rank 0 on rank 1"),
        ("students", "the student's network.transformer.ln_f.bias must hold the bits of rank 0 on rank 1"),
        ("replica", "the teacher's network.model.norm.weight must hold the bits that were loaded on rank 1"),
        ("lent", "the teacher's filters.1.weight must hold the bits that were loaded on rank 1"),
        ("read", "the teacher's network.lm_head.weight must hold the bits of rank 0 on rank 1"),
    ],
)
def test_a_bit_that_flips_stops_the_run_and_is_named(world, what, sentence):
    step = 1 if what == "read" else 2
    for rank in (0, 1):
        assert result(world, "flips", rank)[what].startswith(f"step {step}: {sentence} (")


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_half_written(world):
    for rank in (0, 1):
        seen = result(world, "full_disk", rank)
        assert len(seen["said"]) == 1
        assert "rank 1 could not write step_00000010" in seen["said"][0]
        assert seen["left"] == ["step_00000004", "step_00000006"]
    assert losses(world, "full_disk") == losses(world, "ten_2")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_is_tried_again_is_whole_before_it_is_called_done(world, rank):
    assert result(world, "retried_save", rank) == {"failed": [1.0, 0.0], "fault": None}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_after_the_same_step_wherever_it_comes(world, rank):
    seen = result(world, "stopped_by_signals", rank)
    assert seen == {
        "step": [True, 4], "save": [True, 6], "weigh": [True, 7], "validate": [True, 8], "last": [True, 10],
        "done": [False, 10],
    }  # fmt: skip


def test_a_run_that_was_stopped_five_times_has_every_number_of_one_that_was_not(world):
    result(world, "stopped_by_signals")
    straight, stopped = (without_clocks(world, name) for name in ("unsignalled", "signalled"))
    assert len(straight) > 10
    assert stopped == straight


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_ends_between_a_validation_and_its_save_keeps_the_same_best_checkpoint(world, rank):
    found = result(world, "best_is_kept", rank)
    assert found["ends"] == ["RunStopped", "Preempted", "RunStopped"]
    assert found["straight"] == found["ended"] == [[found["at"], 8], found["at"]] and found["at"] < 8


def test_filters_stand_still_when_the_layer_loss_ends(world):
    after = [s for s in result(world, "layer_loss_ends") if s["step"] > 4]
    on, off = [s for s in after if s["layer"]], [s for s in after if not s["layer"]]
    assert len(on) == len(off) == 3
    assert on[0]["filters"] != on[-1]["filters"]
    assert all(s["filters"] == on[-1]["filters"] and s["left"] == 0 for s in off)
    assert on[-1]["left"] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_loading_needs_less_memory_than_a_rank_s_part_and_one_file(world, rank):
    seen = result(world, "loading_memory", rank)
    assert seen["file"] * 4 < seen["whole"]
    assert seen["peak"] < seen["part"] + seen["file"], seen
    assert 0.9 * seen["whole"] < seen["whole_peak"] < seen["whole"] + seen["tensor"], seen


def test_a_step_reads_the_device_once_and_a_micro_step_never(world):
    per_step = result(world, "host_reads")[:-1]
    assert per_step[1:4] == [["guard.py:read_numbers.tolist"]] * 3, per_step  # stage I
    assert per_step[5:10] == [["guard.py:read_numbers.tolist"]] * 5, per_step  # step 5 comes after a validation


def test_vitals_change_no_bit_of_a_run_of_two_ranks_and_are_measured_by_the_first(world):
    """At every step of stage II all pairs and the output are measured; no rank waits for what another does not do."""
    measured, plain = (result(world, "vitals")[every] for every in ("1", "0"))
    assert measured == plain and len(plain) >= 2
    on, off = (rows(world, f"vitals_{every}") for every in (1, 0))
    assert losses(world, "vitals_1") == losses(world, "vitals_0")
    of_steps = [{key for key in row if key.startswith("vitals/")} for row in on if "loss/layer" in row]
    assert (
        len(of_steps) == 6 and all(keys == of_steps[0] for keys in of_steps) and "vitals/pull_cosine/1" in of_steps[0]
    )
    assert not any(key.startswith("vitals/") for row in off for key in row)


@pytest.mark.parametrize("pairs", ["4", "16"])
def test_a_micro_step_asks_for_every_weight_before_it_is_needed_and_waits_for_no_device(world, pairs):
    """Past the first step of a stage, which learns the order: 4 pairs wait as little as 16."""
    steps = result(world, "traffic")[pairs]
    for step in (*steps[1:3], *steps[4:]):
        assert step["device_waits"] == 0 and step["late"] == [], step
        assert step["stream_waits"] == 2  # DeepSpeed's own, for the reduction of each micro-step


def test_no_weight_is_sent_twice(world):
    """Student and filters once for forward and backward, as their gradients; the teacher and its filters once."""
    parameters, micro_steps = 2 * 128 * 32 + 32 + 4 * 9280, 2
    for step in result(world, "traffic")["4"][4:]:
        filters = sum(step["reduced"]) // micro_steps - 4 * parameters
        assert sum(step["gathered"]) == micro_steps * 2 * (4 * parameters + filters)
    for step in result(world, "traffic")["replicated"][4:]:  # without the teacher, and as much is reduced
        filters = sum(step["reduced"]) // micro_steps - 4 * parameters
        assert sum(step["gathered"]) == micro_steps * (4 * parameters + 2 * filters)


def test_a_student_that_stays_whole_is_sent_once_a_step_and_its_gradients_too_where_they_are_reduced_once(world):
    """Of two micro-steps. Bytes of what is gathered are the plan's, too."""
    found = result(world, "traffic")
    for once, each in zip(found["once"][4:], found["replicated"][4:], strict=True):
        assert 2 * sum(once["reduced"]) == sum(each["reduced"]) and once["late"] == []
        assert 2 * sum(once["gathered"]) == sum(each["gathered"])
    plan = plan_of_models(load_run(world / "runs/traffic_once/run.toml"), 2)
    stage = plan.stages[-1]
    trained = trained_parameters(plan, stage)
    assert sum(once["gathered"]) == 2 * traffic.student_gathers(plan, stage, 4, "cpu").bytes
    assert sum(once["reduced"]) == 2 * traffic.reduction(plan, stage, trained, "cpu").bytes
    assert losses(world, "traffic_once") == pytest.approx(losses(world, "traffic_4"), abs=1e-5)


def test_a_head_that_is_the_embedding_is_sent_once(world):
    """Of student and teacher, for look-up and projection."""
    parameters, micro_steps = 128 * 32 + 32 + 2 * 9280, 2
    for step in result(world, "traffic")["tied"][1:]:
        assert sum(step["gathered"]) == micro_steps * 2 * 4 * parameters


def test_stage_two_needs_no_more_memory_after_stage_one_than_alone(world):
    after, alone = result(world, "stage_two_memory")
    assert abs(after / alone - 1) < 0.02, (after, alone)


def test_recomputed_activations_change_no_loss(world):
    assert losses(world, "vitals_0") == losses(world, "ten_2")  # its activations are


def test_strict_mode_gathers_both_heads_again_for_backward_and_gives_the_same_losses(world):
    pairs = zip(losses(world, "strict_2"), losses(world, "five_2"), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5


def test_filters_of_another_run_give_the_same_stage_two_as_learning_them_here(world):
    assert losses(world, "borrowed_2") == losses(world, "five_2")[2:]


@pytest.mark.parametrize("name", ["own", "per_layer", "mlp", "sampled", "narrow", "narrow_own", "fresh"])
def test_every_kind_of_filter_and_a_fresh_student_are_the_same_on_one_and_two_ranks(world, name):
    two, one = losses(world, f"{name}_2"), losses(world, f"{name}_1")
    assert len(two) in (3, 4)
    assert max(abs(a - b) for a, b in zip(two, one, strict=True)) < 2e-5


def test_a_run_without_stage_one_resumes_to_the_last_bit(world):
    result(world, "without_stage_one")
    straight, resumed = losses(world, "unlearnt"), losses(world, "unlearnt_from_1")
    assert len(straight) == 3
    assert resumed == straight


def test_the_surest_tokens_of_all_ranks_go_without_a_kl_from_the_second_step_on(world):
    """Equal shares: both numbers of ranks found the same floor. A resume takes it from its checkpoint."""
    names = ("sampled_2", "sampled_1", "unlearnt", "unlearnt_from_1")
    told = ([row["loss/kl_share"] for row in rows(world, name) if "loss/kl_share" in row] for name in names)
    two, one, straight, resumed = told
    assert two == one and two[0] == 1.0 and two[1] == pytest.approx(0.6, abs=0.1)
    assert straight == resumed and min(straight) < 0.8


def test_an_offloaded_optimizer_gives_the_same_losses(world):
    pairs = zip(losses(world, "offload_2"), losses(world, "five_2"), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("file", ON_A_CPU, ids=lambda file: file.stem)
def test_every_ds_config_that_a_cpu_can_start_gives_the_same_losses(world, file):
    result(world, "shipped_configs")
    rounds = "bf16" in file.stem  # gradients on their way
    assert losses(world, f"by_{file.stem}") == pytest.approx(losses(world, "five_2"), abs=1e-3 if rounds else 1e-5)


def test_gradients_that_are_reduced_once_a_step_give_the_same_losses(world):
    """In bf16 the order of sums is another one."""
    assert losses(world, "once_fp32") == pytest.approx(losses(world, "five_2"), abs=1e-5)
    assert losses(world, "once_bf16") == pytest.approx(losses(world, "bf16_2"), abs=3e-3)


def test_weights_that_are_gathered_in_8_bits_give_nearly_the_same_losses(world):
    """On a CPU with a stand-in for DeepSpeed's kernels."""
    assert result(world, "int8_gathers") > 0
    exact, rounded = losses(world, "five_2"), losses(world, "int8_gathers")
    assert 1e-4 < max(abs(a - b) for a, b in zip(rounded, exact, strict=True)) < 0.03


def test_student_and_teacher_write_what_their_models_write_alone(world):
    """Three prompts on two ranks, over which both are sharded; before the student's first step."""
    samples = sample_scenarios.samples_of(world, "written")
    assert [sample["step"] for sample in samples] == [step for step in (1, 2, 4, 5) for _ in range(3)]
    teacher = {sample["prompt"]: sample["teacher"] for sample in samples}
    assert len(teacher) == 3 and all(sample["teacher"] == teacher[sample["prompt"]] for sample in samples)
    for sample in samples[:3]:
        assert sample["student"] == sample_scenarios.greedy(world / "speaker", world / "speaker", sample["prompt"])
        assert sample["teacher"] == sample_scenarios.greedy(world / "teacher", world / "speaker", sample["prompt"])
    assert len({sample["student"] for sample in samples}) > 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_goes_on_with_its_samples_and_asks_the_teacher_no_more(world, rank):
    assert result(world, "samples_written", rank) == {"straight": 2 * 5, "resumed": 0}
    assert sample_scenarios.samples_of(world, "written_from_2") == sample_scenarios.samples_of(world, "written")


def test_every_number_of_these_runs_is_explained(world):
    """In docs/reading_a_run.md, where a word in capitals stands for a name."""
    page = (ROOT / "docs/reading_a_run.md").read_text(encoding="utf-8").partition("| key |")[2].partition("\n\n")[0]
    keys = [key for line in page.splitlines()[2:] for key in re.findall(r"`([^`]+)`", line.split("|")[1])]
    known = re.compile("|".join(re.sub("[A-Z]+", "[^/]+", re.escape(key)) for key in keys))
    folders = [file.parent.name for file in (world / "runs").glob("*/metrics.jsonl")]  # a run that was refused has none
    written = {key for folder in folders for row in rows(world, folder) for key in row}
    assert len(keys) > 40 and len(written) > 40
    assert [key for key in sorted(written) if not known.fullmatch(key)] == []


def test_bf16_follows_fp32(world):
    for bf16, fp32 in zip(losses(world, "bf16_2"), losses(world, "five_2"), strict=True):
        assert 0 < abs(bf16 - fp32) < 0.05 * fp32
