"""ted-scale cut-student on text: widths by activation, blocks by influence, and what a cut says of itself."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from cut_models import TOKENS, cut_by_hand, loaded, logits
from tiny import FAMILIES, GQA, MORE, make_corpus, make_model

from ted_scale.base.errors import UserError
from ted_scale.commands import cut_student
from ted_scale.commands.cut_student import main
from ted_scale.commands.cutting.blocks import influences, most_influential
from ted_scale.commands.cutting.joined import find_joined
from ted_scale.config.data import Data
from ted_scale.config.method import Pairs
from ted_scale.data.stream import open_stream, validation_batches
from ted_scale.distill.pairs import match_layers
from ted_scale.models.inspection import inspect

GROUPS = "--hidden 24 --ffn 40 --heads 2 --kv-heads 1"
ONE_WIDTH = "--hidden 24 --ffn 40 --heads 3"  # its config names no head's width
WIDTHS = dict.fromkeys(FAMILIES | MORE, GROUPS)
WIDTHS |= dict.fromkeys(("gpt2", "opt", "gpt_neox", "phi"), ONE_WIDTH)
WIDTHS |= dict.fromkeys(("gemma2", "gemma3"), "--ffn 40 --heads 2")  # embeddings scaled by the hidden width
WIDTHS["stablelm"] = "--hidden 16 --ffn 40 --heads 2 --kv-heads 1"
WIDTHS |= dict.fromkeys(("phi3", "glm"), GROUPS)  # gate and up are one projection
PARTS = [f"self_attn.{part}_proj" for part in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
OUT_OF_HEADS = ("o_proj", "out_proj", "c_proj", "dense")
OUT_OF_FFN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")


@pytest.fixture(scope="module", autouse=True)
def others_still():
    """In stablelm positions follow the config's width of a head, where it has one, and attention does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MORE, "stablelm", (transformers.StableLmConfig, GQA))
        patch.setitem(MORE, "phi3", (transformers.Phi3Config, GQA))
        patch.setitem(MORE, "glm", (transformers.GlmConfig, {**GQA, "head_dim": 8}))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("text") / "text")


def cut(teacher, out, text, *words):
    main([str(teacher), str(out), *words, "--text", str(text), "--tokens", "256", "--seq-len", "64", "--device", "cpu"])
    return loaded(out)


def without_norms(model):
    """Norms divide by a mean over the channels, which is another one where there are fewer."""
    for owner in list(model.modules()):
        for name, module in owner.named_children():
            if "Norm" in type(module).__name__:
                setattr(owner, name, torch.nn.Identity())
    return model


def silence(matrix, inputs, outputs) -> None:
    """The matrix reads nothing from these channels, and writes nothing to those."""
    weight = matrix.weight.data if type(matrix).__name__ == "Conv1D" else matrix.weight.data.T
    weight[inputs] = 0
    weight[:, outputs] = 0
    if matrix.bias is not None:
        matrix.bias.data[outputs] = 0


def others(kept, count: int, width: int = 1) -> list[int]:
    return [c for c in range(count) if c // width not in set(kept.tolist())]


def silenced(model, blocks, kept, names):
    """A model whose blocks were cut, and which does nothing with channels that are not kept."""
    dropped = others(kept.hidden, 32)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("embed_tokens", "embed_positions", "embed_in", "wte", "wpe", "project_in"):
            weight = module.weight.data if isinstance(module, torch.nn.Embedding) else module.weight.data.T
            if weight.shape[1] == 32:
                weight[:, dropped] = 0
    for place, block in enumerate(blocks):
        for name, module in model.get_submodule(names.blocks)[place].named_modules():
            in_attention, last = "attn" in name or "attention" in name, name.rpartition(".")[2]
            if in_attention and last in OUT_OF_HEADS:
                silence(module, others(kept.heads[block], 32, width=8), dropped)
            elif not in_attention and last in OUT_OF_FFN:
                silence(module, others(kept.ffn[block], module.weight.numel() // 32), dropped)
    return model


@pytest.mark.parametrize("family", WIDTHS)
def test_a_cut_in_width_is_the_teacher_with_the_other_channels_silent(family, text, tmp_path, monkeypatch):
    kept, choose = [], cut_student.choose_channels
    monkeypatch.setattr(cut_student, "choose_channels", lambda *given: kept.append(choose(*given)) or kept[0])
    teacher = make_model(tmp_path / "teacher", family, max_shard_size="20KB")
    words = WIDTHS[family].split()
    student = cut(teacher, tmp_path / "cut", text, "--no-refit", "--keep", "0,2,3", *words)
    expected = silenced(cut_by_hand(teacher, [0, 2, 3]), [0, 2, 3], kept[0], inspect("teacher", str(teacher)))
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (student, expected)]
    assert tied[0] == tied[1]
    expected, found = logits(without_norms(expected)), logits(without_norms(student))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for name, value in zip(words[::2], words[1::2], strict=True):
        key = {"--hidden": "hidden_size", "--heads": "num_attention_heads", "--kv-heads": "num_key_value_heads"}.get(
            name
        )
        assert key is None or getattr(student.config, key) == int(value)
    pairs, origin = match_layers(Pairs(), *(inspect("m", str(tmp_path / name)) for name in ("cut", "teacher")))
    assert [t for _, t in pairs] == [0, 2, 3] and origin == "as the student was cut from the teacher"


def changed(folder, change):
    """The model in `folder`, changed there."""
    model = loaded(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def test_what_does_nothing_on_the_text_is_what_goes(text, tmp_path):
    def idle(model):
        for number, block in enumerate(model.model.layers):
            block.mlp.up_proj.weight[number::3] = 0
            block.self_attn.v_proj.weight[8 * (number % 2) :][:8] = 0

    teacher = changed(make_model(tmp_path / "teacher", "llama"), idle)
    student = cut(teacher, tmp_path / "cut", text, "--ffn", "44", "--kv-heads", "1")
    assert student.config.num_attention_heads == 2
    torch.testing.assert_close(logits(student), logits(loaded(teacher)))


def test_hidden_channels_are_the_same_in_all_blocks_and_those_that_are_read_the_most(text, tmp_path):
    def faint(model):
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[::2] *= 0.01
        model.model.norm.weight[::2] *= 0.01

    teacher = changed(make_model(tmp_path / "teacher", "llama"), faint)
    student = cut(teacher, tmp_path / "cut", text, "--hidden", "16")
    rows = loaded(teacher).model.embed_tokens.weight[:, 1::2]
    assert torch.equal(student.model.embed_tokens.weight, rows)


def test_blocks_that_change_no_state_go_first_but_the_ends_stay(text, tmp_path):
    def weak(model):
        for number in (0, 2, 3):
            block = model.model.layers[number]
            block.mlp.down_proj.weight *= 0.001
            block.self_attn.o_proj.weight *= 0.001

    teacher = changed(make_model(tmp_path / "teacher", "llama", num_hidden_layers=6), weak)
    asked = {
        "4": [0, 1, 4, 5],
        "3 --free-ends": [1, 4, 5],
        "4 --rank spread": [0, 2, 3, 5],
    }  # influence, where there is a text
    for number, (more, blocks) in enumerate(asked.items()):
        cut(teacher, tmp_path / f"cut{number}", text, "--layers", *more.split())
        assert json.loads((tmp_path / f"cut{number}" / "cut.json").read_text())["blocks"] == blocks


def test_influence_is_measured_anew_after_each_block_that_goes():
    """Blocks 2 and 3 do the same work: each does little beside the other, and much without it."""
    asked = []

    def influence(kept):
        asked.append(list(kept))
        return {block: 0.1 if {2, 3} <= set(kept) and block in (2, 3) else 1 + block for block in kept}

    assert most_influential(influence, 6, 4, ends=True) == [0, 3, 4, 5]
    assert asked == [[0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5]]
    assert most_influential(influence, 6, 1, ends=True) == [0]


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_the_influence_of_a_cut_model_s_block_is_that_in_the_model_without_the_others(family, text, tmp_path):
    from ted_scale.models.weights import build_network

    anatomy = inspect("m", str(make_model(tmp_path / "teacher", family)))
    seen, given = {}, SimpleNamespace(tokens_BT=TOKENS, packing=None)
    network = build_network(anatomy, ds_config=None, dtype=torch.float32).eval()
    found = influences(network, anatomy, [given], [0, 2, 3])
    model = cut_by_hand(anatomy.folder, [0, 2, 3])
    for place, block in enumerate(model.get_submodule(anatomy.blocks)):
        block.register_forward_hook(
            lambda m, i, o, k=place: seen.update({k: (i[0], o[0] if isinstance(o, tuple) else o)})
        )
    logits(model)
    cosines = [torch.nn.functional.cosine_similarity(*seen[k], dim=-1).mean() for k in range(3)]
    assert list(found) == [0, 2, 3]
    assert list(found.values()) == pytest.approx([1 - float(c) for c in cosines], rel=1e-3)
    assert influences(network, anatomy, [given], [0, 1, 2, 3]) == influences(network, anatomy, [given], [0, 1, 2, 3])


def test_sizes_and_the_loss_before_training_are_printed(text, tmp_path, capsys):
    teacher = make_model(tmp_path / "teacher", "llama")
    student = cut(teacher, tmp_path / "cut", text, "--layers", "2", "--ffn", "40")
    rows = {
        line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("student ")
    }
    every, apart = (sum(p.numel() for p in model.parameters()) for model in (student, student.model.layers))
    assert rows["student"][1:3] == [f"{every:,}", f"{apart + 32:,}"]
    data = Data.model_validate({"corpora": [{"path": str(text), "validation": 0.05}], "seq_len": 64})
    held_out = open_stream(data, 0, 128).held_out["text"]
    nats, count = 0.0, 0
    for batch in validation_batches(held_out, tokens=256, micro_batch=4, rank=0, world=1, device="cpu"):
        with torch.no_grad():
            z = student(batch.tokens_BT).logits.flatten(0, 1)
        nats += float(torch.nn.functional.cross_entropy(z, batch.labels_BT.flatten(), reduction="sum"))
        count += int((batch.labels_BT >= 0).sum())
    assert float(rows["student"][3]) == pytest.approx(nats / count, abs=1e-4)


WRONG = {
    "llama --hidden 16": "--text must be given with --hidden",
    "llama --layers 2 --rank influence": "--text must be given with --rank influence",
    "llama --rank influence --text T": "--layers must be 1 to 4",
    "llama --keep 0,1 --layers 2 --rank influence --text T": "--rank must be left out where --keep lists the blocks",
    "llama --layers 2 --free-ends": "--free-ends must come with --rank influence",
    "llama --hidden 48 --text T": "--hidden must be 1 to 32, the teacher's, but is 48",
    "llama --kv-heads 3 --text T": "--kv-heads must be 1 to 2, the teacher's, but is 3",
    "llama --hidden 30 --text T": r"--hidden must be a multiple of the heads \(4\), but is 30",
    "llama --heads 3 --text T": "--heads must be 1 to 2 for each of the 2 key heads, the same for all, but is 3",
    "llama --heads 4 --kv-heads 1 --text T": "--heads must be 1 to 2 for each of the 1 key heads",
    "gpt2 --hidden 24 --text T": "--hidden must be 8 times the heads in gpt2, whose config cannot name a head's width",
    "stablelm --hidden 24 --heads 2 --kv-heads 1 --text T": "--hidden must be 8 times the heads in stablelm, whose config cannot "
    "name a head's width, but is 24 with 2 heads; ask for --hidden 16",
    "opt --hidden 16 --heads 2 --text T": "the student must have each part of its teacher, but opt has no model.decoder.proj",
    "llama --ffn 40 --text T --seq-len 256": "--seq-len must be at most the context",
    "llama --ffn 40 --text T --held-out 0": "--held-out must be above 0 and below 1, but is 0.0",
    "llama --ffn 40 --text T --held-out 0.0001": r"--text .T. must leave --seq-len \+ 1 = 65 tokens or more for validation",
    "llama --ffn 40 --text T --tokens 0": "--tokens must be 1 or more",
    "llama --ffn 40 --text OTHER": r"must hold token ids in 0..127 \(vocabulary size 128\)",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Teachers, T for a text, and OTHER for one with ids that no teacher has."""
    world = tmp_path_factory.mktemp("world")
    for family in ("llama", "gpt2", "opt", "stablelm"):
        make_model(world / family, family)
    make_corpus(world / "T")
    make_corpus(world / "OTHER", documents=60, vocabulary=400)
    return world


@pytest.mark.parametrize(("words", "sentence"), WRONG.items(), ids=WRONG)
def test_a_wrong_width_or_text_is_refused_in_one_sentence(words, sentence, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    words = [*words.split(), "--device", "cpu", *([] if "--seq-len" in words else ["--seq-len", "64"])]
    with pytest.raises(UserError, match=sentence) as error:
        main([words[0], str(tmp_path / "cut"), *words[1:]])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_text_of_another_tokenizer_is_refused(tmp_path):
    from ted_scale.commands import tokenize_corpus, train_tokenizer

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the cat {n} sat on the mat"}) + "\n" for n in range(400)))
    teacher = make_model(tmp_path / "teacher", "llama", vocab_size=400)
    for size, folder in ((290, tmp_path / "other"), (300, teacher)):
        train_tokenizer.main(["--vocab-size", str(size), "--out", str(tmp_path / f"t{size}"), str(texts)])
        for file in (tmp_path / f"t{size}").iterdir():
            folder.mkdir(exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    tokenize_corpus.main(["--tokenizer", str(tmp_path / "other"), "--out", str(tmp_path / "text"), str(texts)])
    with pytest.raises(UserError, match="--text must be written with the teacher's tokenizer"):
        cut(teacher, tmp_path / "cut", tmp_path / "text", "--ffn", "40")


def test_gate_and_up_in_one_projection_are_fitted_as_two_are(text, tmp_path):
    """phi3 with the weights of a llama: the same student comes of both."""
    llama = loaded(make_model(tmp_path / "llama", "llama"))
    phi3 = loaded(make_model(tmp_path / "phi3", "phi3"))
    values = llama.state_dict()
    for number in range(4):
        own = {name: values[f"model.layers.{number}.{name}.weight"] for name in PARTS}
        values[f"model.layers.{number}.self_attn.qkv_proj.weight"] = torch.cat([own[name] for name in PARTS[:3]])
        values[f"model.layers.{number}.mlp.gate_up_proj.weight"] = torch.cat([own[name] for name in PARTS[3:]])
    phi3.load_state_dict(values, strict=False)
    phi3.save_pretrained(tmp_path / "phi3")
    of_llama, of_phi3 = (
        logits(cut(tmp_path / name, tmp_path / f"cut_{name}", text, "--keep", "0,3", "--ffn", "40"))
        for name in ("llama", "phi3")
    )
    torch.testing.assert_close(of_phi3, of_llama, rtol=1e-3, atol=5e-3 * float(of_llama.abs().max()))


def test_outputs_that_several_channels_of_an_ffn_read_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cut_student, "find_joined", lambda *of: {name: -found.abs() - 1 for name, found in find_joined(*of).items()}
    )
    teacher = make_model(tmp_path / "teacher", "phi3")
    with pytest.raises(UserError, match=r"phi3 has .*gate_up_proj.weight with 128 where the student has 80"):
        cut(teacher, tmp_path / "cut", text, "--ffn", "40")


def test_an_ffn_that_is_half_as_wide_as_the_states_is_joined_by_none(text, tmp_path):
    """Each of its matrices has twice as many outputs as there are channels, or reads them."""
    teacher = make_model(tmp_path / "teacher", "llama", hidden_size=32, intermediate_size=16)
    cut(teacher, tmp_path / "narrow", text, "--hidden", "24")
    cut(teacher, tmp_path / "both", text, "--hidden", "24", "--ffn", "12")
