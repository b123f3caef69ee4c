"""The losses as torch operations: wrong arguments, and what they must not touch or keep."""

import weakref
from typing import get_args

import pytest
import torch
from test_losses import D_S, TRAINED, WIDTH, filtered, heads, ours, tensors

from ted_scale.config.method import Loss
from ted_scale.kernels import choose, describe, filtered_ce, filtered_mse, linear_kl_ce
from ted_scale.kernels.arguments import check_labels
from ted_scale.kernels.backend import CHOICES
from ted_scale.kernels.formulas.divergences import DIVERGENCES
from ted_scale.kernels.formulas.layers import KINDS
from ted_scale.kernels.logit_loss import MODES, logit_chunks
from ted_scale.kernels.products import all_count, live_rows
from ted_scale.kernels.tokens import IGNORED

FILTERS = ("h_s", "w_s", "b_s")
STAGE_ONE = ("h", "filter_w", "filter_b")


def stage_one() -> dict:
    base = tensors()
    values = {k: base[k] for k in ("labels", "token_weight", "denom")}
    g = torch.Generator().manual_seed(0)
    return values | {"h": base["h_s"], "filter_w": torch.randn(WIDTH, D_S, generator=g), "filter_b": torch.zeros(WIDTH)}


def lifted() -> dict:
    g = torch.Generator().manual_seed(0)
    narrow = {"filter_w": torch.randn(3, D_S, generator=g), "filter_b": torch.zeros(3)}
    return stage_one() | narrow | {"lift_w": torch.randn(WIDTH, 3, generator=g)}


def nmse(**values):
    return filtered_mse(**values, kind="nmse")


HEAD = heads()
CALLS = {
    "chunked": (tensors, TRAINED, linear_kl_ce),
    "strict": (tensors, TRAINED, lambda **values: linear_kl_ce(**values, mode="strict")),
    "layers": (filtered, FILTERS, nmse),
    "stage one": (stage_one, STAGE_ONE, lambda **values: filtered_ce(**values, **HEAD.filtered_ce_arguments)),
    "stage one, lifted": (
        lifted,
        (*STAGE_ONE, "lift_w"),
        lambda **values: filtered_ce(**values, **HEAD.filtered_ce_arguments),
    ),
}


@pytest.mark.parametrize(
    ("key", "known"), [("kind", KINDS), ("backend", CHOICES), ("mode", MODES), ("divergence", tuple(DIVERGENCES))]
)
def test_the_run_file_offers_exactly_what_the_kernels_know(key, known):
    """kernels/ and config/ may not import each other, so each has its own list."""
    assert get_args(Loss.model_fields[key].annotation) == known


def test_values_are_read_on_a_cpu_only():
    states, weight, labels = torch.randn(3, 2), torch.ones(3), torch.tensor([0, 9, IGNORED])
    assert live_rows(states, weight) is states and all_count(weight)
    assert not all_count(torch.tensor([1.0, 0.0])) and not all_count(weight.to("meta"))  # reading a meta tensor raises
    check_labels(labels.to("meta"), 3, 9, weight)
    check_labels(labels, 3, 9, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.8 or -100, but holds 9"):
        check_labels(labels, 3, 9, weight)


def test_the_operations_pass_torch_s_own_checks():
    v = tensors()
    arguments = (v["h_s"], v["w_s"], v["head_bias_s"], v["h_t"], v["w_t"], v["head_bias_t"], v["labels"],
                 v["token_weight"], [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [True, True, False], "torch", 5,
                 "jsd", 3, 0.5)  # fmt: skip
    torch.library.opcheck(logit_chunks, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", CALLS)
def test_a_second_backward_is_refused_or_right(name):
    """The gradients are scaled in place: a second scaling would give wrong values without an error."""
    make, trained, loss = CALLS[name]
    values = {k: v.clone().requires_grad_() if k in trained else v for k, v in make().items()}
    out = loss(**values)
    total = out[0] if isinstance(out, tuple) else out
    total.backward(retain_graph=True)
    first = [values[k].grad.clone() for k in trained]
    if name == "strict":
        total.backward()
        assert all(torch.allclose(values[k].grad, 2 * g) for k, g in zip(trained, first, strict=True))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@pytest.mark.parametrize("name", CALLS)
def test_without_grad_there_is_no_gradient_work(name, monkeypatch):
    make, trained, loss = CALLS[name]
    values = {k: v.clone().requires_grad_() if k in trained else v for k, v in make().items()}
    with_grad = loss(**values)

    def refuse(*_):
        raise AssertionError("a gradient was computed")

    for module in ("logit_loss", "layer_loss", "filter_loss"):
        monkeypatch.setattr(f"ted_scale.kernels.{module}.add_gradients", refuse)
    monkeypatch.setattr("ted_scale.kernels.logit_loss_strict.strict_gradients", refuse)
    with torch.no_grad():
        without = loss(**values)
    pairs = zip(with_grad, without, strict=True) if isinstance(without, tuple) else [(with_grad, without)]
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in pairs)


def test_the_teacher_s_state_may_be_freed_at_once():
    values = filtered()
    loss = filtered_mse(**{**values, "h_s": values["h_s"].requires_grad_()}, kind="nmse")
    gone = weakref.ref(values["h_t"])
    del values
    assert loss.requires_grad and gone() is None


def test_strict_mode_saves_the_parameter_itself():
    """ZeRO-3 puts the gathered values into the Parameter that backward reads, not into a copy."""
    values = tensors()
    weight = torch.nn.Parameter(values["w_s"])
    total = linear_kl_ce(**{**values, "w_s": weight}, mode="strict")[0]
    node = total.grad_fn
    assert any(saved is weight for saved in node.saved_tensors)


def test_a_subsample_is_unbiased_and_reads_no_other_row():
    values, head = stage_one(), heads()
    n = len(values["labels"])
    whole = filtered_ce(**values, **head.filtered_ce_arguments)
    parts = [filtered_ce(**values, **head.filtered_ce_arguments, rows=torch.tensor([i])) for i in range(n)]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-5)
    trained = values["h"].clone().requires_grad_()
    filtered_ce(**{**values, "h": trained}, **head.filtered_ce_arguments, rows=torch.tensor([2, 5])).backward()
    assert trained.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 5]


def test_a_row_drawn_twice_counts_twice():
    grads = []
    for rows in ([2], [2, 2]):  # each counts 13-fold, and 13/2-fold
        trained = stage_one()["h"].requires_grad_()
        filtered_ce(**{**stage_one(), "h": trained}, **HEAD.filtered_ce_arguments, rows=torch.tensor(rows)).backward()
        grads.append(trained.grad)
    assert torch.allclose(*grads, atol=1e-6) and grads[0].any()


def test_masked_tokens_do_not_change_stage_one_s_loss():
    values = stage_one()
    masked = (values["labels"] == IGNORED) | (values["token_weight"] == 0)
    bad = {**values, "h": torch.where(masked[:, None], float("nan"), values["h"])}
    clean, dirty = (ours(v, filtered_ce, STAGE_ONE, **HEAD.filtered_ce_arguments) for v in (values, bad))
    assert all(torch.equal(a, b) for a, b in zip([clean[0], *clean[1]], [dirty[0], *dirty[1]], strict=True))
    none = {**values, "labels": torch.full_like(values["labels"], IGNORED), "denom": torch.tensor(0.0)}
    loss, grads = ours(none, filtered_ce, STAGE_ONE, **HEAD.filtered_ce_arguments)
    assert loss == 0 and all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_a_second_derivative_is_refused_and_not_0(mode):
    values = tensors()
    trained = {**values, "h_s": values["h_s"].requires_grad_()}
    (slope,) = torch.autograd.grad(linear_kl_ce(**trained, mode=mode)[0], trained["h_s"], create_graph=True)
    with pytest.raises(RuntimeError):
        slope.square().sum().backward()


@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_a_loss_of_no_tokens_is_0(mode):
    by_token = ("h_s", "h_t", "labels", "token_weight")
    none = {k: v[:0].clone() if k in by_token else v for k, v in tensors().items()}
    outputs, grads = ours(none, mode=mode)
    assert outputs[0] == 0 and grads[0].shape == (0, D_S) and all(g.count_nonzero() == 0 for g in grads)


def test_a_gradient_of_16_bits_has_room_for_the_sum_before_it_is_divided():
    """4096 tokens of one label: the sum of the head's gradient overflows fp16, its mean does not."""
    n = 4096
    values = {"h_s": torch.full((n, 8), 20.0, dtype=torch.float16), "h_t": None, "w_t": None}
    values |= {"w_s": torch.zeros(16, 8, dtype=torch.float16), "labels": torch.zeros(n, dtype=torch.int64)}
    values |= {"token_weight": torch.ones(n), "denom": torch.tensor(float(n)), "kl_weight": 0.0}
    for mode in ("chunked", "strict"):
        (grad,) = ours(values, trained=("w_s",), mode=mode)[1]
        assert grad[0, 0] == pytest.approx(-20 * 15 / 16, rel=1e-2)


WRONG = {
    "h_t must be of shape [13, d]": {"h_t": torch.zeros(12, 9)},
    "w_s must be of shape [V, 6]": {"w_s": torch.zeros(23, 5)},
    "head_bias_s must be of shape [23]": {"head_bias_s": torch.zeros(22)},
    "w_s must be a tensor, but is None": {"w_s": None, "head_bias_s": None},
    "w_t must be float32 like h_t": {"w_t": torch.zeros(19, 9, dtype=torch.bfloat16)},
    "h_s must be float32, bfloat16 or float16, but is int64": {
        "h_s": torch.zeros(13, 6, dtype=torch.int64), "w_s": torch.zeros(23, 6, dtype=torch.int64)
    },
    "labels must be in 0..22 or -100, but holds 23": {"labels": torch.full((13,), 23)},
    "temperature must be above 0, but is 0.0": {"temperature": 0.0},
    "chunk_tokens must be above 0, but is -1": {"chunk_tokens": -1},
    "labels must be of shape [13]": {"labels": torch.zeros(12, dtype=torch.int64)},
    "labels must be int64": {"labels": torch.zeros(13, dtype=torch.int32)},
    "token_weight must be of shape [13]": {"token_weight": torch.zeros(12)},
    "h_t must not require a gradient": {"h_t": torch.zeros(13, 9, requires_grad=True)},
    "w_s must be float32 like h_s": {"w_s": torch.zeros(23, 6, dtype=torch.bfloat16)},
    "h_s must be float32, bfloat16 or float16": {
        "h_s": torch.zeros(13, 6, dtype=torch.float64), "w_s": torch.zeros(23, 6, dtype=torch.float64)
    },
    "w_t must be on cpu like h_s": {"w_t": torch.zeros(19, 9, device="meta")},
    "mode must be one of chunked, strict": {"mode": "sparse"},
    "backend must be one of auto, triton, torch, compiled": {"backend": "cuda"},
    "divergence must be one of forward, reverse, jsd": {"divergence": "tv"},
    "divergence must be forward in strict mode, but is 'jsd'": {"divergence": "jsd", "mode": "strict"},
    "skip_below must be None in strict mode, but is 0.5": {"skip_below": 0.5, "mode": "strict"},
    "skip_below must be None where kl_weight is 0, but is 0.5": {"skip_below": 0.5, "kl_weight": 0.0},
    "top_k must be 0 in strict mode and with backend 'triton', but is 3": {"top_k": 3, "mode": "strict"},
    "h_t must be a tensor where kl_weight is not 0": {"h_t": None},
}  # fmt: skip


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_argument_of_linear_kl_ce_is_named_in_one_sentence(sentence):
    with pytest.raises(ValueError) as error:
        linear_kl_ce(**{**tensors(), **WRONG[sentence]})
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


WRONG_LAYERS = {
    "w_s must give the teacher's 7 filtered dimensions": {"w_s": torch.zeros(8, 6), "b_s": None},
    "b_s must be None where w_s is None": {"w_s": None},
    "h_s must be of shape [13, d]": {"h_s": torch.zeros(12, 6)},
    "b_t must not require a gradient": {"b_t": torch.zeros(7, requires_grad=True)},
    "kind must be one of nmse, mse, cosine": {"kind": "l1"},
    "chunk_tokens must be above 0, but is -1": {"chunk_tokens": -1},
}


@pytest.mark.parametrize("sentence", WRONG_LAYERS)
def test_a_wrong_argument_of_filtered_mse_is_named_in_one_sentence(sentence):
    with pytest.raises(ValueError) as error:
        filtered_mse(**{**filtered(), "kind": "nmse", **WRONG_LAYERS[sentence]})
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("rows", [torch.ones(13, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int64)])
def test_rows_of_stage_one_must_be_numbers_of_rows(rows):
    with pytest.raises(ValueError, match=r"rows must be int64 of shape \[n\], but is"):
        filtered_ce(**stage_one(), **HEAD.filtered_ce_arguments, rows=rows)


def test_a_norm_that_gives_another_width_than_the_head_reads_is_named():
    reading = {**heads().filtered_ce_arguments, "norm": lambda states: states[:, 1:]}
    with pytest.raises(ValueError, match=r"norm's result must be of shape \[13, 7\], but is \[13, 6\]"):
        filtered_ce(**stage_one(), **reading)


def test_a_cpu_uses_torch_and_logs_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert choose("auto", cpu) == "torch"
    assert describe("auto", cpu) == "losses: torch kernels on cpu (auto)"
    monkeypatch.setattr("ted_scale.kernels.backend.runs_triton", lambda device: True)
    assert (
        describe("auto", cpu, 64)
        == "losses: triton kernels on cpu (auto), torch ones for the logits, of which loss.top_k is 64"
    )
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend must be auto, torch or compiled on cpu, but is 'triton'"):
        choose("triton", cpu)
