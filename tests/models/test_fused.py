"""Liger's kernels in a network: the family's own logits and gradients, in the modules that run, and nowhere else."""

import sys

import interpreter
import pytest
import torch
import transformers
from plain import load_model
from test_models import logits_and_gradients, logits_of, tokens
from tiny import FAMILIES, GQA, MORE, make_corpus, make_model, make_run

from ted_scale.base.errors import UserError
from ted_scale.kernels import filtered_ce
from ted_scale.models import fused
from ted_scale.models.anatomy import head_of
from ted_scale.models.fused import describe, fuse, use_liger
from ted_scale.models.inspection import inspect
from ted_scale.plan import make_plan

pytest.importorskip("liger_kernel")
CPU = torch.device("cpu")
OTHERS = {  # which Liger has beside those that all tests run
    "gemma": (transformers.GemmaConfig, {**GQA, "head_dim": 8}),
    "granite": (transformers.GraniteConfig, {**GQA, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "ministral": (transformers.MinistralConfig, {**GQA, "head_dim": 8, "sliding_window": 8}),
    "olmo2": (transformers.Olmo2Config, GQA),
    "phi3": (transformers.Phi3Config, {**GQA, "partial_rotary_factor": 0.5}),
}
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch):
    if not torch.cuda.is_available():
        interpreter.mend()
        interpreter.mend_liger(monkeypatch)
        yield
        interpreter.unmend()
    else:
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def tiny(root, family: str, **sizes):
    """(anatomy, network) of a model of one block."""
    folder = root / family
    if not folder.exists():
        kinds = {"layer_types": ["sliding_attention"]} if family == "gemma3" else {}
        with pytest.MonkeyPatch.context() as patch:
            for name, settings in OTHERS.items():
                patch.setitem(MORE, name, settings)
            make_model(folder, family, **{**SMALL, **kinds, **sizes})
    return load_model(folder)


LIGER = [*(f for f in (*FAMILIES, *MORE, *OTHERS) if f.replace("gemma3", "gemma3_text") in fused.FAMILIES)]


def test_every_listed_family_is_tested():
    assert sorted(f.replace("gemma3", "gemma3_text") for f in LIGER) == sorted(fused.FAMILIES)


def changed(network) -> set[str]:
    """Types of modules with their own forward."""
    return {type(module).__name__ for module in network.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("family", LIGER)
def test_liger_s_kernels_give_a_family_s_own_logits_and_gradients(models, family):
    """fp32 in another order: the largest seen difference was 3e-6 of logits of size 1. Every kernel is called."""
    anatomy, network = tiny(models, family)
    wanted, slopes = logits_and_gradients(network, anatomy, [tokens(2, 12)])
    file = vars(sys.modules[type(network).__module__])
    before = dict(file)
    _, other = tiny(models, family)
    logits, gradients = logits_and_gradients(use_liger(other), anatomy, [tokens(2, 12)])
    kinds = {name.removesuffix("Attention").removesuffix("MLP").removesuffix("RMSNorm") for name in changed(other)}
    assert len(changed(other)) == 3 and len(kinds) == 1, changed(other)
    assert file == before and not changed(network)
    assert 0 < (logits - wanted).abs().max() < 2e-5
    assert gradients.keys() == slopes.keys()
    sizes = max(slope.norm() for slope in slopes.values())
    assert max((gradients[n] - slope).norm() / sizes for n, slope in slopes.items()) < 1e-5


@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE} - {*LIGER}))
def test_a_family_without_kernels_is_named(models, family):
    anatomy, _ = tiny(models, family)
    with pytest.raises(UserError, match=rf"for a student of family {anatomy.family}, but is 'liger'"):
        fused.check("liger", {"teacher": None, "student": anatomy}, "causal")


def test_a_gate_with_another_activation_keeps_its_own(models):
    anatomy, network = tiny(models / "relu", "llama", hidden_act="relu")
    with torch.no_grad():
        wanted = logits_of(network, anatomy, tokens(1, 8))
        assert (logits_of(use_liger(network), anatomy, tokens(1, 8)) - wanted).abs().max() < 2e-5
    assert changed(network) == {"LlamaAttention", "LlamaRMSNorm"}


def test_auto_changes_nothing_on_a_cpu_and_compiles_torch_s_own_attention_on_a_gpu(models, monkeypatch):
    assert fused.chosen("auto", "llama", ["sdpa"], CPU) == "off"
    monkeypatch.setattr(fused, "runs_triton", lambda device: True)
    assert fused.chosen("auto", "llama", ["sdpa"], CPU) == "compile"
    assert fused.chosen("auto", "llama", ["sdpa", "varlen"], CPU) == "liger"
    assert fused.chosen("auto", "gpt2", ["varlen"], CPU) == "off"
    monkeypatch.setattr(fused, "installed", lambda: False)
    assert fused.chosen("auto", "llama", ["varlen"], CPU) == "off"
    said = describe("auto", {"student": "compile", "teacher": "off"})
    assert said == "blocks: student to be compiled by torch at the first steps, teacher as in transformers (auto)"


def test_only_blocks_are_compiled(models):
    anatomy, network = tiny(models, "llama")
    assert changed(fuse(network, network.get_submodule(anatomy.blocks), "compile")) == {"LlamaDecoderLayer"}


def test_what_does_not_work_is_refused(models, monkeypatch):
    anatomy, _ = tiny(models, "llama")
    sides = {"student": anatomy, "teacher": anatomy}
    with pytest.raises(UserError, match=r"where data\.attention is 'document', but is 'compile'"):
        fused.check("compile", sides, "document")
    monkeypatch.setattr(fused, "installed", lambda: False)
    with pytest.raises(
        UserError, match=r"where liger-kernel is not installed, but is 'liger'; pip install -e \".\[liger\]\""
    ):
        fused.check("liger", sides, "causal")


def test_an_impossible_setting_is_refused_before_the_ranks_start(models, monkeypatch):
    tiny(models, "llama"), tiny(models, "gpt2")
    make_corpus(models / "corpus")
    sections = {"student": {"path": str(models / "gpt2")}, "teacher": {"path": str(models / "llama")}}
    with pytest.raises(UserError, match="for a student of family gpt2, but is 'liger'"):
        make_plan(make_run(models, method="kd", fused_blocks="liger", **sections), 1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for way in ("liger", "compile"):
        with pytest.raises(
            UserError, match=f"must be auto or off on cpu, but is '{way}', which needs ROCm or CUDA sm_80"
        ):
            fused.check_device(way, CPU)


def test_a_model_inspected_beside_a_fused_one_is_not_fused(models):
    anatomy, network = tiny(models, "qwen3")
    use_liger(network)
    assert inspect("student.path", str(models / "qwen3")) == anatomy


def test_a_filter_learns_through_the_tail(models):
    """Stage I calls the last norm without its hooks."""
    anatomy, network = tiny(models, "llama")
    states = torch.randn(6, anatomy.width, generator=torch.Generator().manual_seed(0))
    found = []
    for head in (head_of(network, anatomy), head_of(use_liger(tiny(models, "llama")[1]), anatomy)):
        weight, bias = torch.eye(anatomy.width).requires_grad_(), torch.zeros(anatomy.width, requires_grad=True)
        settings = {"labels": torch.arange(6), "token_weight": torch.ones(6), "denom": 6.0}
        filtered_ce(states, weight, bias, **settings, **head.filtered_ce_arguments).backward()
        found.append((weight.grad, bias.grad))
    assert all((a - b).abs().max() < 1e-5 < b.abs().max() for a, b in zip(*found, strict=True))


def test_activations_computed_again_give_the_same_gradients(models):
    anatomy, network = tiny(models, "llama")
    _, once = logits_and_gradients(use_liger(network).train(), anatomy, [tokens(1, 8)])
    network.gradient_checkpointing_enable({"use_reentrant": False})
    _, again = logits_and_gradients(network, anatomy, [tokens(1, 8)])
    assert all(torch.equal(once[name], again[name]) for name in once)
