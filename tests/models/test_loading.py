"""Weights from disk, as transformers would load them, and the models that are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from plain import load_model, own_model
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_model

from ted_scale.base.errors import UserError
from ted_scale.models.inspection import empty_model, inspect, read_config
from ted_scale.models.weights import build_network
from ted_scale.models.zero import bare_construction


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with one model of each family."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_model(root / family, family)
    return root


def test_a_model_without_causal_head_is_refused(tmp_path):
    transformers.T5Config(num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"teacher.path must be a decoder-only causal LM, but .*\(t5\) is not"):
        inspect("teacher.path", str(tmp_path), needs_weights=False)


def assert_loads_like_transformers(folder: Path) -> None:
    _, network = load_model(folder)
    expected, mine = own_model(folder).state_dict(), network.state_dict()
    assert expected.keys() == mine.keys()
    assert all(torch.equal(mine[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loader_gives_what_from_pretrained_gives(models, name):
    assert_loads_like_transformers(models / name)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loader_reads_several_files(tmp_path, name):
    make_model(tmp_path, name, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_loads_like_transformers(tmp_path)


def rewrite(folder: Path, change) -> Path:
    """Pass the folder's tensors through `change`."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def test_the_loader_knows_gpt2_s_old_names_without_prefix(tmp_path):
    make_model(tmp_path, "gpt2")
    rewrite(tmp_path, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()})
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_loads_like_transformers(tmp_path)


def test_the_loader_knows_gpt_neox_s_old_name_of_the_head(tmp_path):
    make_model(tmp_path, "gpt_neox")
    rewrite(tmp_path, lambda tensors: {k.replace("lm_head.", "embed_out."): v for k, v in tensors.items()})
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    assert_loads_like_transformers(tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_tied_head_is_one_parameter_after_loading(models, name):
    _, network = load_model(models / name)
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight


NORM = "model.norm.weight"


def wrong(folder: Path, fault: str) -> None:
    file = folder / "model.safetensors"
    if fault == "shape":
        rewrite(folder, lambda tensors: {**tensors, NORM: torch.ones(31)})
    elif fault == "missing":
        rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if "layers.2." not in k})
    else:
        file.write_bytes(file.read_bytes()[: {"truncated": -1000, "cut header": 100, "empty": 0}[fault]])


FAULTS = {
    "shape": r"model.safetensors: model.norm.weight must have shape \(32,\), but has \(31,\); the file belongs to another",
    "missing": r"must hold the weights its config.json describes, but model.layers.2.\S+ is missing \(9 in all\)",
    "truncated": r"model.safetensors must be a whole safetensors file, but is not: .*; copy it again",
    "cut header": r"model.safetensors must be a whole safetensors file, but is not: .*; copy it again",
    "empty": r"model.safetensors must be a whole safetensors file, but is not: .*; copy it again",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_weights_are_refused_in_one_sentence(tmp_path, fault):
    make_model(tmp_path, "llama")
    wrong(tmp_path, fault)
    anatomy = inspect("student.path", str(tmp_path))
    with pytest.raises(UserError) as caught:
        build_network(anatomy, ds_config=None, dtype=torch.float32)
    assert re.search(FAULTS[fault], str(caught.value)) and "\n" not in str(caught.value)


CONFIGS = {
    "missing": None,
    "not json": "{",
    "unknown family": json.dumps({"model_type": "no_such_family"}),
    "no family": json.dumps({"hidden_size": 3}),
    "wrong type": json.dumps({"model_type": "llama", "hidden_size": "wide"}),
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_an_unreadable_config_is_refused_in_one_sentence(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        inspect("student.path", str(tmp_path), needs_weights=False)
    assert re.match(r"student.path must .*, but ", str(caught.value)) and "\n" not in str(caught.value)


def test_no_matrix_of_a_whole_model_is_in_the_host_s_memory_while_it_is_made(models):
    for family in FAMILIES:
        with bare_construction(torch.device("meta")):
            network = empty_model(read_config("teacher.path", models / family), torch.float32)
        assert {weight.device.type for weight in network.parameters() if weight.dim() > 1} == {"meta"}


def test_random_weights_follow_the_seed_and_not_the_file(models):
    anatomy = inspect("student.path", str(models / "llama"))
    first, again, other = (
        build_network(anatomy, ds_config=None, dtype=torch.float32, init="random", seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first[name], other[name]) and first[name].std() > 0.1
    assert torch.equal(first[NORM], torch.ones(32))
    assert not torch.equal(first[name], own_model(models / "llama").state_dict()[name])
