"""ted-scale cut-student fits what it keeps to the teacher: by families, and where there is nothing to fit."""

from contextlib import chdir

import pytest
import torch
from cut_models import loaded, logits
from tiny import FAMILIES, MORE, make_corpus, make_model

from ted_scale.base.errors import UserError
from ted_scale.commands.cut_student import main

WORDS = {"gemma2": "--ffn 40", "gemma3": "--ffn 40"}  # a norm stands between their last matrix and the states


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("text") / "text")


def cut(teacher, out, text, *words):
    """By the shards' name alone: the order of their windows follows from it, and a test's folder is another each time."""
    reading = ["--text", text.name, "--tokens", "2048", "--seq-len", "64", "--device", "cpu"]
    with chdir(text.parent):
        main([str(teacher), str(out), *words, *reading])
    return loaded(out)


@pytest.mark.parametrize("family", FAMILIES | MORE)
def test_a_student_that_lacks_nothing_stays_its_teacher(family, text, tmp_path):
    teacher = make_model(tmp_path / "teacher", family)
    expected = logits(loaded(teacher))
    found = logits(cut(teacher, tmp_path / "cut", text, "--keep", "0,1,2,3"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES | MORE)
def test_a_fitted_student_is_nearer_to_its_teacher(family, text, tmp_path):
    teacher = make_model(tmp_path / "teacher", family, initializer_range=0.2)
    expected = logits(loaded(teacher))
    words = ["--keep", "0,3", *WORDS.get(family, "--ffn 40").split()]
    plain, fitted = (
        (logits(cut(teacher, tmp_path / f"cut{len(more)}", text, *words, *more)) - expected).square().mean()
        for more in (["--no-refit"], [])
    )
    assert fitted < 0.95 * plain


def test_a_matrix_that_reads_nothing_keeps_its_weights(text, tmp_path):
    model = loaded(make_model(tmp_path / "teacher", "llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(tmp_path / "teacher")
    student = cut(tmp_path / "teacher", tmp_path / "cut", text, "--keep", "0,3", "--ffn", "40")
    read = student.model.layers[0].mlp.down_proj.weight
    assert any(torch.equal(read[:, 0], column) for column in model.model.layers[0].mlp.down_proj.weight.T)


def test_states_that_are_not_finite_are_a_sentence(text, tmp_path):
    model = loaded(make_model(tmp_path / "teacher", "llama"))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(
        UserError, match=r"^--dtype must be one in which the states of --text are finite, but model.layers.0.mlp"
    ):
        cut(tmp_path / "teacher", tmp_path / "cut", text, "--keep", "0,3")
    assert not (tmp_path / "cut").exists()


def test_all_but_the_matrices_of_blocks_stay_as_they_were_and_so_do_dtypes(text, tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama", dtype=torch.bfloat16)
    student = cut(teacher, tmp_path / "cut", text, "--keep", "0,2", "--dtype", "float32")
    own, theirs = student.state_dict(), loaded(teacher).state_dict()
    assert {tensor.dtype for tensor in own.values()} == {torch.bfloat16}
    for name, tensor in own.items():
        origin = theirs[name.replace("layers.1.", "layers.2.")]
        if "layers" not in name or "norm" in name:
            assert torch.equal(tensor, origin), name
        elif "down_proj" in name:
            assert not torch.equal(tensor, origin), name
