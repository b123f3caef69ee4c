"""Nine families: the results of inspect(), our own forward of them, document masks, checkpointing, no host reads."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from dense_attention import packing_of
from plain import load_model, own_model
from tiny import FAMILIES, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING

from ted_scale.base.errors import UserError
from ted_scale.kernels import filtered_ce
from ted_scale.kernels.formulas.logits import soften
from ted_scale.models.anatomy import Anatomy, StateRecorder, head_of, run_body
from ted_scale.models.inspection import inspect

LENGTH = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with one model of each family."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_model(root / family, family)
    return root


@pytest.fixture(params=FAMILIES)
def family(request, models) -> tuple[Anatomy, torch.nn.Module]:
    return load_model(models / request.param)


def tokens(batch=2, length=LENGTH) -> torch.Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(5))


def logits_of(network, anatomy, tokens_BT, packing=None):
    """Our own forward: body, head, soften."""
    head = head_of(network, anatomy)
    z = torch.nn.functional.linear(run_body(network, anatomy, tokens_BT, packing), head.weight, head.bias)
    return soften(z, head.softcap, head.logit_scale)


FACTS = {  # body, blocks, tail
    "gpt2": ("transformer", "transformer.h", ("transformer.ln_f",)),
    "opt": ("model.decoder", "model.decoder.layers", ("model.decoder.final_layer_norm", "model.decoder.project_out")),
    "gpt_neox": ("gpt_neox", "gpt_neox.layers", ("gpt_neox.final_layer_norm",)),
    "phi": ("model", "model.layers", ("model.final_layernorm",)),
}


def test_inspect_learns_the_anatomy_without_weights(family):
    anatomy, network = family
    name = anatomy.family
    assert (anatomy.body, anatomy.blocks, anatomy.tail) == FACTS.get(name, ("model", "model.layers", ("model.norm",)))
    assert anatomy.blocks_apart == 4
    assert (anatomy.layers, anatomy.width, anatomy.vocab_size, anatomy.max_length) == (4, 32, 128, 128)
    assert anatomy.head_width == (16 if name == "opt" else 32)
    assert (anatomy.softcap, anatomy.logit_scale) == (30.0 if name == "gemma2" else None, 1.0)
    assert anatomy.parameters == sum(p.numel() for p in network.parameters())


REFUSED = {
    "bloom": "that uses transformers' attention interface, but bloom does not",
    "xglm": "that uses transformers' attention interface, but xglm does not",
    "gpt_neox_japanese": "that uses transformers' attention interface, but gpt_neox_japanese does not",
    "trocr": "that uses transformers' attention interface, but trocr does not",
    "bert": "must be a causal LM, but bert lets every token see later ones",
    "roberta": "must be a causal LM, but roberta lets every token see later ones",
    "granite_swa": "but granite_swa's takes s_aux, which is not known here",
    "modernbert-decoder": "but modernbert-decoder has lm_head.dense between them",
}


@pytest.mark.parametrize(("name", "said"), REFUSED.items(), ids=REFUSED)
def test_a_family_that_would_run_wrongly_is_refused_in_one_sentence(tmp_path, name, said):
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
    CONFIG_MAPPING[name](**sizes, **tokens).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        inspect("student.path", str(tmp_path), needs_weights=False)
    assert str(caught.value).startswith("student.path must ") and "\n" not in str(caught.value)


def test_our_path_gives_the_family_s_own_logits(family):
    anatomy, network = family
    with torch.no_grad():
        expected = own_model(anatomy.folder)(tokens()).logits
        assert expected.std() > 0.5
        assert (logits_of(network, anatomy, tokens()) - expected).abs().max() < 2e-5


def test_our_path_gives_the_family_s_own_logits_where_it_scales_them(tmp_path):
    make_model(tmp_path / "m", "gemma2", final_logit_softcapping=2.0, attn_logit_softcapping=1.0)
    anatomy, network = load_model(tmp_path / "m")
    assert anatomy.softcap == 2.0
    with torch.no_grad():
        expected = own_model(tmp_path / "m", attn_implementation="eager")(tokens()).logits
        assert (logits_of(network, anatomy, tokens()) - expected).abs().max() < 2e-5


def test_a_recorded_state_is_its_block_s_output_before_the_tail(family):
    anatomy, network = family
    recorder, seen = StateRecorder(network, anatomy, [0, 3]), {}
    blocks = network.get_submodule(anatomy.blocks)
    for k in (0, 3):
        blocks[k].register_forward_hook(lambda m, i, output, k=k: seen.update({k: output}))
    with torch.no_grad(), recorder.record(True) as states:
        last = run_body(network, anatomy, tokens())
        listed = own_model(anatomy.folder)(tokens(), output_hidden_states=True).hidden_states
    assert states.keys() == {0, 3}
    for k, output in seen.items():
        assert torch.equal(states[k], output[0] if isinstance(output, tuple) else output)
    # transformers counts the embeddings as 0, and its last entry is past the final norm: that one is not block 3's.
    assert (states[0] - listed[1]).abs().max() < 1e-5
    assert listed[4].shape != states[3].shape or (states[3] - listed[4]).abs().max() > 1e-2
    assert torch.equal(head_of(network, anatomy).norm(states[3]), last)


def test_states_are_kept_only_inside_record(family):
    anatomy, network = family
    recorder = StateRecorder(network, anatomy, [1])
    with torch.no_grad():
        run_body(network, anatomy, tokens())
        assert recorder.states == {}
        with recorder.record(False) as states:
            run_body(network, anatomy, tokens())
            assert states == {}
        with recorder.record(True) as states:
            run_body(network, anatomy, tokens())
        assert states.keys() == {1} and recorder.states == {}


def test_the_identity_filter_on_the_last_block_reads_the_model_s_own_ce(family):
    anatomy, network = family
    with torch.no_grad(), StateRecorder(network, anatomy, [3]).record(True) as states:
        run_body(network, anatomy, tokens())
        expected = own_model(anatomy.folder)(tokens(), labels=tokens()).loss
        labels = tokens().roll(-1, dims=1)
        labels[:, -1] = -100
        states, weights, count = states[3].flatten(0, 1), torch.ones(labels.numel()), (labels != -100).sum()
        head = head_of(network, anatomy)
        eye = torch.eye(anatomy.width)
        ce = filtered_ce(
            states,
            eye,
            torch.zeros(anatomy.width),
            labels=labels.flatten(),
            token_weight=weights,
            denom=count,
            **head.filtered_ce_arguments,
        )
    assert ce.item() == pytest.approx(expected.item(), abs=1e-5)


LENGTHS = [[11, 13], [1, 20, 3]]  # of two rows' documents; some are longer than the sliding windows
NUDGED = [[12, 12], [1, 20, 3]]  # one border a token late


def logits_and_gradients(network, anatomy, texts, packing=None):
    """The logits of all tokens in one tensor, and the weights' gradients of a loss on them."""
    network.zero_grad()
    logits = torch.cat([logits_of(network, anatomy, text, packing).flatten(0, 1) for text in texts])
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * pull).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def differences(network, anatomy, lengths) -> tuple[float, float]:
    """(largest of a logit, largest of a weight's gradient relative to its size): the differences between packed documents, with
    borders at `lengths`, and each document alone."""
    rows = tokens(2)
    texts = [d for row, cuts in zip(rows, LENGTHS, strict=True) for d in row[None].split(cuts, dim=1)]
    together, slopes = logits_and_gradients(network, anatomy, [rows], packing_of(lengths, LENGTH))
    alone, wanted = logits_and_gradients(network, anatomy, texts)
    assert slopes.keys() == wanted.keys() and len(slopes) > 20
    sizes = max(w.norm().item() for w in wanted.values())
    return (together - alone).abs().max().item(), max((slopes[n] - w).norm().item() / sizes for n, w in wanted.items())


def test_packed_documents_give_the_logits_and_gradients_that_each_gives_alone(family):
    """fp32 sums in another order: the largest seen difference was 1e-6 of logits of size 1 and of gradients. A token that
    leaks into another document gives 0.01."""
    anatomy, network = family
    logits, gradients = differences(network, anatomy, LENGTHS)
    assert logits < 2e-5 and gradients < 1e-5
    logits, gradients = differences(network, anatomy, NUDGED)
    assert logits > 1e-2 and gradients > 1e-3


def states_and_gradients(network, anatomy, recorder, blocks):
    network.zero_grad()
    counts = dict.fromkeys(blocks, 0)
    with recorder.record(True) as states:
        kept = states.__setitem__

        class Counting(dict):
            def __setitem__(self, k, v):
                counts[k] += 1
                kept(k, v)

        recorder.states = Counting()
        last = run_body(network, anatomy, tokens())
    loss = last.square().mean() + sum(states[k].square().mean() * (k + 1) for k in blocks)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return {k: v.detach().clone() for k, v in states.items()}, gradients, counts


def test_gradient_checkpointing_changes_neither_states_nor_gradients_and_keeps_states_once(family):
    anatomy, network = family
    network.train()
    recorder = StateRecorder(network, anatomy, [0, 2])
    states, gradients, _ = states_and_gradients(network, anatomy, recorder, [0, 2])
    runs = []
    first_block = network.get_submodule(anatomy.blocks)[0]
    leaf = next(m for m in first_block.modules() if not list(m.children()))  # the block's own hooks may stay outside
    leaf.register_forward_pre_hook(lambda *_: runs.append(1))
    network.gradient_checkpointing_enable({"use_reentrant": False})
    again, again_gradients, counts = states_and_gradients(network, anatomy, recorder, [0, 2])
    assert len(runs) == 2  # block 0 was really computed again in the backward pass
    assert counts == {0: 1, 2: 1} and recorder.states == {}
    assert all(torch.equal(states[k], again[k]) for k in (0, 2))
    assert gradients.keys() == again_gradients.keys() and len(gradients) > 20
    assert max((gradients[n] - again_gradients[n]).abs().max().item() for n in gradients) < 1e-6


class NoHostReads(TorchDispatchMode):
    """Fails if a value is copied from the device to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"), name
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads(monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch, NoHostReads():
        for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "cpu"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


def test_the_check_for_host_reads_finds_one(monkeypatch):
    for read in (torch.nonzero, lambda t: bool(t.all()), lambda t: t.tolist(), lambda t: t.sum().item()):
        with pytest.raises(AssertionError), no_host_reads(monkeypatch):
            read(torch.ones(3))


@pytest.mark.parametrize("masked", [False, True], ids=["one document", "documents"])
def test_a_forward_reads_nothing_on_the_host(family, masked, monkeypatch):
    anatomy, network = family
    row, packing = tokens(2), packing_of(LENGTHS, LENGTH) if masked else None
    with torch.no_grad(), no_host_reads(monkeypatch):
        run_body(network, anatomy, row, packing)
