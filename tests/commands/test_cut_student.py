"""A cut model is its teacher with blocks taken out, in every family, read and written shard by shard."""

import json
import subprocess
import sys

import pytest
import torch
from cut_models import cut_by_hand, loaded, logits
from places import ROOT
from tiny import make_model

from ted_scale.base.errors import UserError
from ted_scale.commands.cut_student import main
from ted_scale.config.method import Pairs
from ted_scale.distill.pairs import match_layers
from ted_scale.models.inspection import inspect


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma2", "opt", "gpt_neox"])
@pytest.mark.parametrize("arguments, blocks", [(["--layers", "2"], [0, 3]), (["--keep", "0,2,3"], [0, 2, 3])])
def test_a_cut_is_the_teacher_without_the_other_blocks(family, arguments, blocks, tmp_path):
    teacher = make_model(tmp_path / "teacher", family, max_shard_size="20KB")
    main([str(teacher), str(tmp_path / "cut"), *arguments, "--max-shard-gb", "0.00003"])
    student = loaded(tmp_path / "cut")
    assert (tmp_path / "cut" / "model.safetensors.index.json").is_file()
    assert student.config.num_hidden_layers == len(blocks)
    expected = logits(cut_by_hand(teacher, blocks))
    assert not torch.allclose(expected, logits(loaded(teacher)), atol=1e-3)
    torch.testing.assert_close(logits(student), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("arguments", "blocks"), [(["--layers", "3"], [0, 3, 6]), (["--layers", "1"], [0])])
def test_a_cut_keeps_both_ends_and_a_run_matches_blocks_by_the_cut(arguments, blocks, tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama", num_hidden_layers=7)
    main([str(teacher), str(tmp_path / "cut"), *arguments])
    whole, cut = loaded(teacher).model.layers, loaded(tmp_path / "cut").model.layers
    pairs, origin = match_layers(Pairs(), *(inspect("m", str(tmp_path / name)) for name in ("cut", "teacher")))
    assert [t for _, t in pairs] == blocks and origin == "as the student was cut from the teacher"
    for block_s, block_t in pairs:
        assert torch.equal(cut[block_s].mlp.up_proj.weight, whole[block_t].mlp.up_proj.weight)


@pytest.mark.parametrize("written", [True, False])
def test_layer_types_follow_their_blocks(written, tmp_path):
    teacher = make_model(tmp_path / "teacher", "gemma2")
    values = json.loads((teacher / "config.json").read_text())
    types = values["layer_types"]
    if not written:  # older config.json files leave them to the family's default
        del values["layer_types"]
        (teacher / "config.json").write_text(json.dumps(values))
    main([str(teacher), str(tmp_path / "cut"), "--keep", "0,2,3"])
    assert types[1] != types[2]
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["layer_types"] == [types[b] for b in (0, 2, 3)]


def test_other_config_values_and_the_tokenizer_are_the_teachers(tmp_path):
    teacher = make_model(tmp_path / "teacher", "gpt2", attn_pdrop=0.3, eos_token_id=[2, 3, 4, 5])
    (teacher / "merges.txt").write_text("a b\n")
    main([str(teacher), str(tmp_path / "cut"), "--layers", "2"])
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "cut", teacher))
    assert ours == {**theirs, "n_layer": 2}
    assert (tmp_path / "cut" / "merges.txt").read_text() == "a b\n"
    assert (tmp_path / "cut" / "generation_config.json").is_file()


def test_a_checkpoint_without_the_base_models_prefix_is_read(tmp_path):
    from safetensors.torch import load_file, save_file

    teacher = make_model(tmp_path / "teacher", "gpt2")
    expected = logits(cut_by_hand(teacher, [0, 3]))
    tensors = load_file(teacher / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old |= {f"h.{k}.attn.bias": torch.ones(1, 1, 8, 8) for k in range(4)}  # masks that early versions saved
    save_file(old, teacher / "model.safetensors")
    main([str(teacher), str(tmp_path / "cut"), "--layers", "2"])
    torch.testing.assert_close(logits(loaded(tmp_path / "cut")), expected, rtol=0, atol=0)


def test_the_dtype_of_the_weights_is_kept(tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama", dtype=torch.bfloat16)
    main([str(teacher), str(tmp_path / "cut"), "--layers", "1"])
    assert loaded(tmp_path / "cut").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--layers must be 1 to 4"),
        (["--layers", "5"], "--layers must be 1 to 4, the teacher's blocks, but is 5"),
        (["--layers", "0"], "but is 0"),
        (["--keep", "0,4"], "--keep must list blocks 0 to 3"),
        (["--keep", "2,1"], "rising order"),
        (["--keep", "a"], "--keep must list block numbers"),
        (["--keep", "0,1", "--layers", "3"], r"--layers must be how many blocks --keep lists \(2\)"),
    ],
)
def test_wrong_numbers_are_refused(arguments, sentence, tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama")
    with pytest.raises(UserError, match=sentence):
        main([str(teacher), str(tmp_path / "cut"), *arguments])
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]


def test_an_existing_folder_is_kept_without_overwrite_and_the_teacher_always(tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama")
    other = make_model(tmp_path / "other", "gpt2")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").touch()
    with pytest.raises(UserError, match="OUT must be a new or an empty folder"):
        main([str(teacher), str(other), "--layers", "2"])
    with pytest.raises(UserError, match="must replace a model folder"):
        main([str(teacher), str(notes), "--layers", "2", "--overwrite"])
    with pytest.raises(UserError, match="OUT must not hold what is read"):
        main([str(teacher), str(teacher), "--layers", "2", "--overwrite"])
    main([str(teacher), str(other), "--layers", "2", "--overwrite"])
    assert loaded(other).config.model_type == "llama"
    assert loaded(teacher).config.num_hidden_layers == 4


def test_a_damaged_teacher_leaves_nothing_behind(tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama", max_shard_size="20KB")
    first = min(teacher.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(UserError, match="must be a whole safetensors file"):
        main([str(teacher), str(tmp_path / "cut"), "--layers", "2"])
    first.unlink()
    with pytest.raises(UserError, match="TEACHER must hold the weights"):
        main([str(teacher), str(tmp_path / "cut"), "--layers", "2"])
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "tools/cut_student.py", tmp_path / "none", tmp_path / "cut", "--layers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "TEACHER must be a folder that is there" in done.stderr
