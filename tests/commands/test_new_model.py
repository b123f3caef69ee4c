"""A new model's folder is one that a run can start from: the tokenizer's vocabulary, what was set, and no weights."""

import json

import pytest
import torch
from tiny import make_corpus, make_run

from ted_scale.base.errors import UserError
from ted_scale.commands.new_model import main
from ted_scale.models.inspection import inspect

SMALL = {
    "llama": ["hidden_size=32", "num_hidden_layers=3", "num_attention_heads=4", "intermediate_size=64"],
    "qwen2": ["hidden_size=32", "num_hidden_layers=3", "num_attention_heads=4", "num_key_value_heads=2"],
    "gpt2": ["n_embd=32", "num_hidden_layers=3", "n_head=4", "n_positions=64"],
    "gemma2": ["hidden_size=32", "num_hidden_layers=3", "head_dim=8", "intermediate_size=64", "sliding_window=16"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of 100 words, the last of which ends a text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {**{f"w{i}": i for i in range(98)}, "<s>": 98, "</s>": 99}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def make(tokenizer, out, *arguments, family="llama"):
    main(["--family", family, "--tokenizer", str(tokenizer), "--out", str(out), *arguments])
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("family", SMALL)
def test_set_values_are_in_the_config_and_the_model_is_accepted(family, tokenizer, tmp_path):
    make(tokenizer, tmp_path / "new", "--set", *SMALL[family], family=family)
    anatomy = inspect("student.path", str(tmp_path / "new"), needs_weights=False)
    assert (anatomy.family, anatomy.layers, anatomy.width, anatomy.vocab_size) == (family, 3, 32, 100)
    assert not any((tmp_path / "new").glob("*.safetensors"))


def test_a_run_is_planned_over_it_and_its_weights_are_drawn(tokenizer, tmp_path):
    from ted_scale.models.weights import build_network
    from ted_scale.plan import make_plan

    make(tokenizer, tmp_path / "student", "--set", *SMALL["llama"])
    make_corpus(tmp_path / "corpus", vocabulary=100)
    student = {"path": str(tmp_path / "student"), "init": "random"}
    plan = make_plan(make_run(tmp_path, method="ce", teacher=None, student=student), world=1)
    network = build_network(plan.student, ds_config=None, dtype=torch.float32, init="random", seed=3)
    assert 0.01 < network.model.layers[0].mlp.up_proj.weight.std() < 0.03


def test_the_tokenizer_is_copied_with_its_special_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    config = make(tokenizer, tmp_path / "new", "--set", *SMALL["llama"])
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (98, 99, None)
    assert GenerationConfig.from_pretrained(tmp_path / "new").eos_token_id == 99
    assert AutoTokenizer.from_pretrained(tmp_path / "new").convert_tokens_to_ids(["w7", "</s>"]) == [7, 99]


def test_the_vocabulary_is_padded_to_a_multiple(tokenizer, tmp_path):
    assert make(tokenizer, tmp_path / "new", "--pad-vocab-to", "64", "--set", *SMALL["llama"])["vocab_size"] == 128


@pytest.mark.parametrize(
    "arguments, family, sentence",
    [
        ([], "lama", "--family must be .* but is 'lama'; did you mean llama"),
        ([], "gemma3", "--family must be a text model, but is 'gemma3'; did you mean gemma3_text"),
        (["--set", "hiden_size=8"], "llama", "config, but has 'hiden_size'; did you mean hidden_size"),
        (["--set", "hidden_size"], "llama", "--set must look like key=value"),
        (["--set", "hidden_size=wide"], "llama", "expected int, got str"),
        (["--set", "hidden_size=30", "num_attention_heads=4"], "llama", "not a multiple of the number of attention"),
        (["--set", "vocab_size=7"], "llama", "--set must leave vocab_size out"),
        (["--pad-vocab-to", "0"], "llama", "--pad-vocab-to must be at least 1"),
        (["--set", "hidden_act=nothing"], "llama", "must be a decoder-only causal LM"),
    ],
)
def test_wrong_settings_are_refused_and_leave_nothing(arguments, family, sentence, tokenizer, tmp_path):
    with pytest.raises(UserError, match=sentence):
        make(tokenizer, tmp_path / "new", *arguments, family=family)
    assert not any(tmp_path.iterdir())


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="--tokenizer must be a folder"):
        make(tmp_path / "none", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="does not load"):
        make(tmp_path / "empty", tmp_path / "new")
