"""A student with adapters against plain peft and transformers, its losses with those of the merged weights, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from plain import build, make_batch, make_shard, run_step
from tiny import make_model, make_run

from ted_scale.base.errors import UserError
from ted_scale.distill.trained import trained_parameters
from ted_scale.kernels.tokens import IGNORED
from ted_scale.models import fingerprint, lora
from ted_scale.plan import describe, make_plan, plan_of_models

LORA = {"rank": 3, "alpha": 12.0}


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def world(request, tmp_path_factory):
    """A tied student, whose matrices are turned in one of the families."""
    root = tmp_path_factory.mktemp(request.param)
    make_model(root / "teacher", "llama", hidden_size=48)
    make_model(root / "student", request.param, num_hidden_layers=2, seed=1)
    make_shard(root / "corpus")
    return root


def adapted(root, **sections):
    """Parts whose adapters do something: B starts at 0."""
    parts = build(root, student={"lora": LORA}, **sections)
    for name, parameter in parts.student.network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return parts


def test_losses_and_gradients_are_those_of_plain_peft(world):
    from peft import LoraConfig, get_peft_model

    parts, batch = adapted(world, method="ce"), make_batch()
    (ours,), gradients = run_step(parts, [batch])
    config = LoraConfig(r=3, lora_alpha=12, target_modules="all-linear")
    theirs = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(world / "student"), config).train()
    weights = {n: p for n, p in parts.student.network.named_parameters() if "lora_" in n}
    trained = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert trained.keys() == weights.keys()
    for name, parameter in trained.items():
        parameter.data.copy_(weights[name])
    logits = theirs.eval()(batch.tokens_BT).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORED)
    loss.backward()
    assert ours.total.item() == pytest.approx(loss.item(), rel=1e-5)
    assert gradients.keys() == {f"network.{name}" for name in trained}
    for name, parameter in trained.items():
        assert torch.allclose(gradients[f"network.{name}"], parameter.grad, atol=1e-6), name
    assert max(g.abs().max().item() for g in gradients.values()) > 1e-3


def test_all_terms_are_those_of_the_merged_weights(world):
    parts, batch = adapted(world), make_batch()
    (ours,), gradients = run_step(parts, [batch])
    plain = build(world)
    trained = dict(parts.student.network.named_parameters())
    settings = parts.plan.run.student.lora
    with torch.no_grad():
        for name, matrix in lora.matrices(parts.plan.student, settings.targets).items():
            a, b = (trained[f"{name}.{own}"] for own in lora.NAMES)
            plain.student.network.get_submodule(name).weight += lora.delta(matrix, settings, a, b)
    (merged,), _ = run_step(plain, [batch])
    assert torch.allclose(torch.stack(ours[:4]), torch.stack(merged[:4]), rtol=1e-5)
    assert {name for name in gradients if "lora_" not in name and not name.startswith("filters_s")} == set()


def test_what_is_trained_is_counted_and_printed(world):
    parts = adapted(world)
    trained = sum(p.numel() for p in parts.student.parameters() if p.requires_grad)
    assert trained_parameters(parts.plan, parts.stage) == trained
    network = parts.student.network
    own = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert f"{own:,} trainable parameters" in describe(parts.plan)
    counted = dict(lora.shapes(parts.plan.student, parts.plan.run.student.lora))
    assert counted == {n: tuple(p.shape) for n, p in network.named_parameters() if p.requires_grad}


def test_targets_that_name_no_matrix_of_a_block_are_refused(world):
    for target in ("lm_head", "wte", "embed_tokens", "proj"):
        run = make_run(world, student={"lora": {"targets": [target]}})
        with pytest.raises(UserError, match=rf"student.lora.targets must name linear maps.*but '{target}' is none"):
            plan_of_models(run, 1)


def test_a_run_without_peft_is_refused_in_a_sentence(world, monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="must be left out where peft is not installed"):
        plan_of_models(make_run(world, student={"lora": LORA}), 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora": {"rank": 0}}, "greater than 0"),
        ({"lora": {"targets": []}}, "lora.targets must name a linear map"),
        ({"lora": LORA, "init": "random"}, "init must be 'weights' where student.lora is set"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, values, said):
    with pytest.raises(ValueError, match=said):
        make_run(tmp_path, student=values)


def test_a_checkpoint_of_adapters_names_its_base_by_the_bytes_of_its_weights(world, tmp_path):
    plan = make_plan(make_run(world, student={"lora": LORA}), 1)
    assert plan.identity()["student.base"] == fingerprint.sampled(world / "student")
    other = make_model(tmp_path / "other", plan.student.family, num_hidden_layers=2, seed=2)
    assert fingerprint.fingerprint(other) == fingerprint.fingerprint(world / "student")
    assert fingerprint.sampled(other) != fingerprint.sampled(world / "student")


def test_a_base_is_the_same_when_another_version_of_transformers_wrote_its_config(world, tmp_path):
    other = shutil.copytree(world / "student", tmp_path / "other")
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"transformers_version": "0"}))
    assert fingerprint.fingerprint(other) != fingerprint.fingerprint(world / "student")
    assert fingerprint.sampled(other) == fingerprint.sampled(world / "student")
