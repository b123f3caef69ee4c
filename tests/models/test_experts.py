"""Mixtures of experts and recurrences as teachers: what transformers loads and computes, counted rightly, and refused elsewhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from dense_attention import packing_of
from plain import build, load_model, make_batch, make_shard, own_model
from safetensors.torch import load_file, save_file
from test_models import LENGTHS, NUDGED, logits_of, tokens
from tiny import EXPERTS, RECURRENT, TEACHERS, make_model, make_run

from ted_scale.base.errors import UserError
from ted_scale.distill import memory
from ted_scale.distill.flops import body_flops
from ted_scale.distill.signal import Signal
from ted_scale.engines import blocks_are
from ted_scale.forecast import step
from ted_scale.kernels.formulas.logits import soften
from ted_scale.models import attention, fused, quantized, ulysses
from ted_scale.models.anatomy import StateRecorder, head_of, run_body
from ted_scale.models.inspection import inspect
from ted_scale.models.places import Place, placer
from ted_scale.models.weights import load_file as load_file_of
from ted_scale.plan import make_plan

TOKENS = torch.arange(1, 49).view(2, 24)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with one model of each family, in several files, a small student and a corpus."""
    root = tmp_path_factory.mktemp("models")
    for family in TEACHERS:
        make_model(root / family, family, max_shard_size="40KB")
    make_model(root / "student", "llama", num_hidden_layers=2, seed=1)
    make_shard(root / "corpus")
    return root


@pytest.mark.parametrize("family", TEACHERS)
def test_every_expert_is_where_transformers_merges_it_and_states_and_logits_are_its_own(models, family):
    anatomy, network = load_model(models / family, is_frozen=True)
    own = own_model(models / family)
    expected, mine = own.state_dict(), network.state_dict()
    assert expected.keys() == mine.keys() and all(torch.equal(mine[name], t) for name, t in expected.items())
    head = head_of(network, anatomy)
    with torch.no_grad(), recorded(network, anatomy) as states, recorded(own, anatomy) as listed:
        wanted, last = own(TOKENS, use_cache=False).logits, run_body(network, anatomy, TOKENS)
    logits = soften(torch.nn.functional.linear(last, head.weight, head.bias), head.softcap, head.logit_scale)
    assert wanted.std() > 0.3 and (logits - wanted).abs().max() < 2e-5
    assert states.keys() == listed.keys() == {0, 1, 2, 3}
    assert max((states[k] - listed[k]).abs().max() / listed[k].abs().max() for k in states) < 1e-5


def test_ranks_do_not_share_rows_of_a_model_with_sinks(models):
    """Each rank would need those of its heads."""
    anatomy = inspect("teacher.path", str(models / "gpt_oss"), is_frozen=True)
    with pytest.raises(
        UserError, match=r"^data.sequence_parallel must be 1 for a teacher with attention sinks, but is 2 for "
    ):
        ulysses.check_model("teacher", anatomy, 2)


def recorded(network, anatomy):
    """The states of all its blocks."""
    return StateRecorder(network, anatomy, range(anatomy.layers)).record(True)


def test_files_have_experts_one_by_one_where_the_network_has_them_merged(models):
    for family in [*EXPERTS, "qwen3_next"]:
        kept = {key for file in (models / family).glob("*.safetensors") for key in load_file(file)}
        alone = {key for key in kept if re.search(r"\.experts\.\d+\.", key)}
        assert len(alone) >= (0 if family == "gpt_oss" else 3 * 3 * 4)
        assert not alone & load_model(models / family, is_frozen=True)[1].state_dict().keys()


def test_a_part_of_an_expert_is_one_stretch():
    merged = torch.arange(4 * 6 * 5).view(4, 6, 5)
    for expert in range(4):
        for part in range(2):
            shape, begin = Place("x", expert, part, 2).within(tuple(merged.shape))
            piece = merged[expert, 3 * part : 3 * part + 3]
            assert shape == (3, 5) and torch.equal(merged.flatten()[begin : begin + 15], piece.flatten())


def test_three_ranks_read_all_rows_of_the_experts_between_them(models, monkeypatch):
    """Their shards begin and end inside of experts, and the last has padding."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda rank: rank)
    own = own_model(models / "qwen3_moe").state_dict()
    shards = [{name: Shard(t, rank) for name, t in own.items()} for rank in range(3)]
    place = placer(load_model(models / "qwen3_moe", is_frozen=True)[1], own)
    for of_rank in shards:
        for file in (models / "qwen3_moe").glob("*.safetensors"):
            load_file_of(file, of_rank, place)
    for name, whole in own.items():
        read = torch.cat([of_rank[name].ds_tensor for of_rank in shards])[: whole.numel()]
        assert torch.equal(read.view(whole.shape), whole)


class Shard:
    """What is asked of a parameter that three ranks share."""

    def __init__(self, whole: torch.Tensor, rank: int):
        self.ds_id, self.ds_shape, self.ds_numel, self.ds_process_group = 0, whole.shape, whole.numel(), rank
        self.ds_tensor = torch.full((-(-whole.numel() // 3),), torch.nan)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_keeps_documents_apart(models, family):
    anatomy, network = load_model(models / family, is_frozen=True)
    rows = tokens(2)
    texts = [text for row, cuts in zip(rows, LENGTHS, strict=True) for text in row[None].split(cuts, dim=1)]
    with torch.no_grad():
        alone = torch.cat([logits_of(network, anatomy, text).flatten(0, 1) for text in texts])
        packed, wrong = (
            logits_of(network, anatomy, rows, packing_of(cuts, 24)).flatten(0, 1) for cuts in (LENGTHS, NUDGED)
        )
    assert (packed - alone).abs().max() < 2e-5 and (wrong - alone).abs().max() > 1e-2


@pytest.mark.parametrize("family", TEACHERS)
def test_a_dense_student_has_the_losses_of_plain_transformers_beside_it(models, family):
    parts = build(models, teacher={"path": str(models / family)}, filters={"steps": 0})
    batch, weights, teacher = make_batch(rows=2), parts.stage.weights(parts.stage.first_step), parts.teacher.body
    keep = batch.labels_BT != -100
    own, denom = own_model(models / family), keep.sum()
    ours = parts.student(batch, parts.teacher(batch, weights), weights, denom)
    with torch.no_grad(), recorded(own, teacher.anatomy) as states:
        logits_t = own(batch.tokens_BT, use_cache=False).logits
        logits_s = own_model(models / "student")(batch.tokens_BT).logits
    p, q = (logits[keep].log_softmax(-1) for logits in (logits_t, logits_s))
    kl = (p.exp() * (p - q)).sum() / denom
    ce = -q.gather(-1, batch.labels_BT[keep][:, None]).sum() / denom
    assert (ours.kl.item(), ours.ce.item()) == (pytest.approx(kl.item(), abs=1e-5), pytest.approx(ce.item(), abs=1e-5))
    theirs = Signal(tuple(states[block].flatten(0, 1) for block in teacher.blocks), ours_last(parts, batch))
    again = parts.student(batch, theirs, weights, denom)
    assert ours.layer > 0 and ours.layer.item() == pytest.approx(again.layer.item(), abs=1e-5)


def ours_last(parts, batch):
    with torch.no_grad():
        return run_body(parts.teacher.body.network, parts.plan.teacher, batch.tokens_BT).flatten(0, 1)


@pytest.mark.parametrize("family", EXPERTS)
def test_flops_count_the_chosen_experts_and_memory_counts_all(models, tmp_path, family):
    few = inspect("teacher.path", str(models / family), is_frozen=True)
    key = next(k for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in EXPERTS[family][1])
    more = make_model(tmp_path, family, **{key: 2 * EXPERTS[family][1][key]})
    many = inspect("teacher.path", str(more), is_frozen=True)
    routers = many.matrices - few.matrices  # a row of width 32 for each expert
    assert 0 < routers <= 4 * 32 * EXPERTS[family][1][key]
    assert body_flops(many, lambda _: 0) - body_flops(few, lambda _: 0) == 2 * routers
    assert many.in_blocks > 1.5 * few.in_blocks
    plan = make_plan(make_run(models, method="kd", teacher={"path": str(more), "placement": "replicated"}), 1)
    assert memory.terms(plan, plan.stages[0], "cpu")[0]["teacher"] == 4 * many.parameters


def test_memory_and_bytes_of_a_streamed_mixture_are_those_of_its_own_blocks(models):
    """The first block of this one is dense, and smaller."""
    teacher = {"path": str(models / "deepseek_v3"), "placement": "offload"}
    plan = make_plan(make_run(models, method="kd", teacher=teacher), 1)
    network = load_model(models / "deepseek_v3", is_frozen=True)[1]
    away = memory.terms(plan, plan.stages[0], "cuda")[1]
    assert away == sum(p.nbytes for p in network.model.layers.parameters())


def test_a_teacher_of_8_bits_keeps_its_experts_in_bf16_and_says_so(models):
    anatomy = inspect("teacher.path", str(models / "qwen3_moe"), is_frozen=True)
    said = quantized.describe(anatomy, "int8")
    assert said.startswith("the teacher in int8: 16 matrices of its blocks, ") and "self_attn.o_proj x 4" in said
    named = "mlp.experts.gate_up_proj x 4, mlp.experts.down_proj x 4, mlp.gate.weight x 4"
    assert sorted(said.rpartition("and so do ")[2].removesuffix(", which torchao does not take").split(", ")) == sorted(
        named.split(", ")
    )


@pytest.mark.parametrize("family", [*EXPERTS, "qwen3_next"])
def test_a_mixture_of_experts_is_no_student(models, family):
    with pytest.raises(
        UserError, match=r"^student.path must be a dense model, but .* has \d experts, which only a teacher may"
    ):
        inspect("student.path", str(models / family))


def test_a_recurrence_without_attention_is_no_student(models):
    with pytest.raises(
        UserError, match=r"^student.path must be a causal LM that uses transformers' attention interface"
    ):
        inspect("student.path", str(models / "mamba2"))


@pytest.mark.parametrize(("family", "apart"), {"mamba2": 0, "falcon_h1": 0, "qwen3_next": 1}.items())
def test_a_teacher_with_recurrences_cannot_keep_documents_apart(models, family, apart):
    sections = {"teacher": {"path": str(models / family)}, "data": {"attention": "document"}}
    with pytest.raises(UserError) as caught:
        make_plan(make_run(models, **sections), 1)
    assert str(caught.value) == (
        "data.attention must be 'causal' where not all blocks keep documents apart, but is 'document' for a teacher of family "
        f"{family}, where {apart} of 4 blocks do; leave it out"
    )
    assert family in RECURRENT


def test_torch_compiles_blocks_of_experts_but_unrolls_no_recurrence(models, monkeypatch):
    """As on a GPU."""
    for module in (fused, attention):
        monkeypatch.setattr(module, "runs_triton", lambda device: True)
    for family, way in {"qwen3_moe": "compile", "mamba2": "off", "falcon_h1": "off", "qwen3_next": "off"}.items():
        plan = make_plan(make_run(models, method="kd", teacher={"path": str(models / family)}), 1)
        assert blocks_are(plan, "teacher", torch.device("cpu")) == way
        assert step.fuses(plan, "teacher", "cuda") == (way == "compile")


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_what_a_block_keeps_is_known_without_weights(models, family):
    """Eight tokens would fill a chunk of 64 of the second family, and seem to need eight times as much."""
    anatomy, network = load_model(models / family, is_frozen=True)
    weights, kept = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.arange(128).remainder(127)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_body(network, anatomy, tokens)
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights) / 128
    assert memory.kept_a_token(anatomy, torch.float32) == pytest.approx(found, rel=0.15)


def rewrite(folder: Path, change) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
FAULTS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != EXPERT}, r"layers.1.mlp.experts.gate_up_proj is missing \(1 in"),
    "shape": (lambda t: {**t, EXPERT: torch.ones(24, 31)}, r"2.up_proj.weight must have shape \(24, 32\), but has \(24, 31\)"),
    "number": (lambda t: {**t, EXPERT.replace(".2.", ".5."): t[EXPERT].clone()}, r"5.up_proj.weight must have shape \(\), but has"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
def test_experts_that_are_not_those_of_the_config_are_refused(tmp_path, change, said):
    rewrite(make_model(tmp_path, "qwen3_moe"), change)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path, is_frozen=True)


def test_rounded_weights_are_refused_for_their_scales_are_not_read(models, tmp_path):
    values = json.loads((models / "gpt_oss" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(
        UserError, match=r"^teacher.path must have plain weights, but the config.json of .* has a quantization_"
    ):
        inspect("teacher.path", str(tmp_path), needs_weights=False, is_frozen=True)
