"""The losses as torch operations: compiled, checked, called wrongly, beside others' implementations, and in memory."""

import sys
import weakref

import pytest
import torch
from test_losses import D_S, TRAINED, WIDTH, filtered, heads, ours, tensors

from ted_scale.data import IGNORED
from ted_scale.kernels import choose, describe, filtered_ce, filtered_mse, linear_kl_ce
from ted_scale.kernels.linear_kl_ce import logit_chunks
from ted_scale.kernels.matmul import all_count, live_rows
from tools.bench.memory import peak_bytes

FILTERS = ("h_s", "w_s", "b_s")
STAGE_ONE = ("h", "filter_w", "filter_b")


def stage_one() -> dict:
    base = tensors()
    values = {k: base[k] for k in ("labels", "token_weight", "denom")}
    g = torch.Generator().manual_seed(0)
    return values | {"h": base["h_s"], "filter_w": torch.randn(WIDTH, D_S, generator=g), "filter_b": torch.zeros(WIDTH)}


def nmse(**values):
    return filtered_mse(**values, kind="nmse")


HEAD = heads()
CALLS = {
    "chunked": (tensors, TRAINED, linear_kl_ce),
    "strict": (tensors, TRAINED, lambda **values: linear_kl_ce(**values, mode="strict")),
    "layers": (filtered, FILTERS, nmse),
    "stage one": (stage_one, STAGE_ONE, lambda **values: filtered_ce(**values, **HEAD.reading)),
}


def test_only_weights_on_a_cpu_are_looked_at():
    states, weight = torch.randn(3, 2), torch.ones(3)
    assert live_rows(states, weight) is states and all_count(weight)
    assert not all_count(torch.tensor([1.0, 0.0])) and not all_count(weight.to("meta"))  # reading a meta tensor raises


@pytest.mark.parametrize("name", CALLS)
def test_torch_compile_takes_a_loss_without_a_graph_break(name):
    make, trained, loss = CALLS[name]

    def twice(**values):
        out = loss(**values)
        return 2 * (out[0] if isinstance(out, tuple) else out)

    eager, grads = ours(make(), twice, trained)
    compiled, compiled_grads = ours(make(), torch.compile(twice, fullgraph=True, backend="aot_eager"), trained)
    assert all(torch.equal(a, b) for a, b in zip([eager, *grads], [compiled, *compiled_grads], strict=True))


def test_the_operations_pass_torch_s_own_checks():
    v = tensors()
    arguments = (v["h_s"], v["w_s"], v["head_bias_s"], v["h_t"], v["w_t"], v["head_bias_t"], v["labels"],
                 v["token_weight"], [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [True, True, False], "torch", 5)  # fmt: skip
    torch.library.opcheck(logit_chunks, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["compiled"])
def test_the_compiled_backend_has_the_same_values(name):
    """In fp32, with two chunks of one size and a ragged one."""
    eager, grads = ours(tensors(), chunk_tokens=5, temperature=2.0)
    compiled, compiled_grads = ours(tensors(), chunk_tokens=5, temperature=2.0, backend=name)
    for a, b in zip([*eager, *grads], [*compiled, *compiled_grads], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_backward_is_refused_or_right(name):
    """Gradients formed with the loss are scaled in place: twice would be wrong in silence."""
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
        raise AssertionError("a gradient was formed")

    for module in ("linear_kl_ce", "filtered_mse", "filtered_ce"):  # the functions have their modules' names
        monkeypatch.setattr(sys.modules[f"ted_scale.kernels.{module}"], "add_gradients", refuse)
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
    whole = filtered_ce(**values, **head.reading)
    parts = [filtered_ce(**values, **head.reading, rows=torch.tensor([i])) for i in range(n)]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-5)
    trained = values["h"].clone().requires_grad_()
    filtered_ce(**{**values, "h": trained}, **head.reading, rows=torch.tensor([2, 5])).backward()
    assert trained.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 5]


WRONG = {
    "h_t must be of shape [13, d]": {"h_t": torch.zeros(12, 9)},
    "w_s must be of shape [V, 6]": {"w_s": torch.zeros(23, 5)},
    "head_bias_s must be of shape [23]": {"head_bias_s": torch.zeros(22)},
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
}


@pytest.mark.parametrize("sentence", WRONG_LAYERS)
def test_a_wrong_argument_of_filtered_mse_is_named_in_one_sentence(sentence):
    with pytest.raises(ValueError) as error:
        filtered_mse(**{**filtered(), "kind": "nmse", **WRONG_LAYERS[sentence]})
    assert str(error.value).startswith(sentence)


def test_a_norm_that_gives_another_width_than_the_head_reads_is_named():
    reading = {**heads().reading, "norm": lambda states: states[:, 1:]}
    with pytest.raises(ValueError, match=r"norm's result must be of shape \[13, 7\], but is \[13, 6\]"):
        filtered_ce(**stage_one(), **reading)


def test_cpu_takes_torch_and_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert choose("auto", cpu) == "torch"
    assert describe("auto", cpu) == "losses: torch kernels on cpu (auto)"
    with pytest.raises(ValueError, match="backend must be auto, torch or compiled on cpu, but is 'triton'"):
        choose("triton", cpu)


def oracle_values():
    """No weights but 1: Liger and cut-cross-entropy know none."""
    values = tensors(n=64, d_s=16, d_t=24, v_s=301, v_t=301)
    return {**values, "token_weight": torch.ones(64), "denom": (values["labels"] != IGNORED).sum().float()}


@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_liger_s_distillation_loss_agrees(mode):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    values = oracle_values()
    mine, grads = ours(values, trained=("h_s", "w_s"), mode=mode, ce_weight=0.3, kl_weight=0.7, chunk_tokens=16)
    h, w = (values[k].clone().requires_grad_() for k in ("h_s", "w_s"))
    # Liger drops ignored tokens from neither term's numerator but CE's: it is shown the counted tokens alone.
    kept = values["labels"] != IGNORED
    settings = {"weight_hard_loss": 0.3, "weight_soft_loss": 0.7, "beta": 0.0, "compiled": False, "chunk_size": 16}
    h_t, labels = (values[k][kept] for k in ("h_t", "labels"))
    biases = values["head_bias_s"], values["head_bias_t"]
    loss = liger.LigerFusedLinearJSDLoss(**settings)(h[kept], w, h_t, values["w_t"], labels, *biases)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    for a, b in zip([mine[0], *grads], [loss, h.grad, w.grad], strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-5


@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_cut_cross_entropy_agrees(mode):
    cce = pytest.importorskip("cut_cross_entropy")
    values = {**oracle_values(), **dict.fromkeys(("h_t", "w_t", "head_bias_t", "head_bias_s"))}
    mine, grads = ours(values, kl_weight=0.0, softcap_s=20.0, mode=mode, chunk_tokens=16)
    h, w = (values[k].clone().requires_grad_() for k in ("h_s", "w_s"))
    loss = cce.linear_cross_entropy(h, w, values["labels"], softcap=20.0, impl="torch_compile")
    loss.backward()
    for a, other in zip([mine[0], *grads], [loss, h.grad, w.grad], strict=True):
        assert ((a - other).abs().max() / other.abs().max()).item() < 1e-5


def test_memory_at_a_real_size():
    """2048 tokens, d 512, V 32000 in fp32: 250 MiB at most, where two whole logits alone are 500."""
    n, d, vocab = 2048, 512, 32000
    h, h_t = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
    w, w_t = torch.randn(vocab, d, requires_grad=True), torch.randn(vocab, d)
    labels, ones, denom = torch.randint(0, vocab, (n,)), torch.ones(n), torch.tensor(float(n))
    peak = peak_bytes(lambda: linear_kl_ce(h, w, h_t, w_t, labels, ones, denom=denom)[0].backward())
    assert peak <= 250 * 2**20, peak / 2**20
    wide = [torch.randn(n, d) for _ in range(2)], [torch.randn(d, d, requires_grad=True) for _ in range(8)]
    states = [torch.randn(n, d, requires_grad=True) for _ in range(8)]
    fixed = torch.randn(d, d)

    def naive():
        pairs = zip(states, wide[1], strict=True)
        sum((h @ w.T - wide[0][0] @ fixed.T).square().sum(-1).mean() for h, w in pairs).backward()

    def fused():
        pairs = zip(states, wide[1], strict=True)
        sum(
            filtered_mse(wide[0][0], fixed, None, h, w, None, ones, denom=denom, kind="mse") for h, w in pairs
        ).backward()

    returned = sum(t.numel() * 4 for t in (*states, *wide[1]))
    beyond = []
    for step in (naive, fused):
        for tensor in (*states, *wide[1]):
            tensor.grad = None
        beyond.append(peak_bytes(step) - returned)
    assert beyond[1] <= beyond[0] / 6, beyond
