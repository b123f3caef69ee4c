"""Every loss term against a naive fp64 formula, one token at a time, and the properties that training relies on."""

import itertools

import pytest
import torch
from memory import peak_bytes

from ted_scale.data import IGNORED, Batch
from ted_scale.losses import count_valid, filtered_ce, filtered_mse, linear_kl_ce
from ted_scale.models import Head

N, D_S, D_T, WIDTH, V_S, V_T = 13, 6, 9, 7, 23, 19


def tensors(seed=0, *, n=N, d_s=D_S, d_t=D_T, v_s=V_S, v_t=V_T, dtype=torch.float32) -> dict:
    """Random operands of linear_kl_ce; among the tokens are ignored ones, weight 0 and uneven weights."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) * 1.5).to(dtype)

    labels = torch.randint(0, min(v_s, v_t), (n,), generator=g)
    labels[[1, n - 1]] = IGNORED
    weights = torch.rand(n, generator=g) + 0.5
    weights[[0, 4]] = 0.0
    return {
        "h_s": draw(n, d_s), "w_s": draw(v_s, d_s), "h_t": draw(n, d_t), "w_t": draw(v_t, d_t), "labels": labels,
        "token_weight": weights, "denom": torch.tensor(11.0), "head_bias_s": draw(v_s), "head_bias_t": draw(v_t),
    }  # fmt: skip


TRAINED = ("h_s", "w_s", "head_bias_s")


def ours(values: dict, loss=linear_kl_ce, trained=TRAINED, **settings):
    """(outputs, gradients of `trained`)"""
    values = {k: v.clone().requires_grad_() if k in trained and v is not None else v for k, v in values.items()}
    outputs = loss(**values, **settings)
    total = outputs[0] if isinstance(outputs, tuple) else outputs
    total.backward()
    return outputs, [values[k].grad for k in trained if values[k] is not None]


def naive_logits(h, w, b, cap, scale):
    z = scale * (w @ h + (b if b is not None else 0))
    return z if cap is None else cap * torch.tanh(z / cap)


def naive_kl_ce(h_s, w_s, h_t, w_t, labels, token_weight, denom, head_bias_s, head_bias_t, temperature=1.0, kl_weight=1.0,
                ce_weight=1.0, softcap_s=None, softcap_t=None, logit_scale_s=1.0, logit_scale_t=1.0, chunk_tokens=None):  # fmt: skip
    kl = ce = 0.0
    shared = min(len(w_s), len(w_t))
    for i, label in enumerate(labels.tolist()):
        if label == IGNORED or token_weight[i] <= 0:
            continue
        z_s = naive_logits(h_s[i], w_s, head_bias_s, softcap_s, logit_scale_s)
        z_t = naive_logits(h_t[i], w_t, head_bias_t, softcap_t, logit_scale_t)
        p, q = (z[:shared].div(temperature).exp() for z in (z_t, z_s))
        p, q = p / p.sum(), q / q.sum()
        kl = kl + token_weight[i] * temperature**2 * (p * (p / q).log()).sum()
        ce = ce - token_weight[i] * (z_s.exp()[label] / z_s.exp().sum()).log()
    return (ce_weight * ce + kl_weight * kl) / denom, kl / denom, ce / denom


def doubled(values: dict) -> dict:
    return {k: v.double() if v is not None and v.is_floating_point() else v for k, v in values.items()}


def assert_equal(mine, theirs, tolerance=2e-5):
    """Values and gradients, relative to the largest entry."""
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3), (a, b)


SETTINGS = {
    "plain": {},
    "t half": {"temperature": 0.5},
    "t two": {"temperature": 2.0, "kl_weight": 0.3, "ce_weight": 0.7},
    "softcaps": {"softcap_s": 3.0, "softcap_t": 5.0, "temperature": 2.0},
    "scales": {"logit_scale_s": 0.25, "logit_scale_t": 1.7, "softcap_s": 4.0},
    "kl only": {"ce_weight": 0.0},
    "ce only": {"kl_weight": 0.0},
}


@pytest.mark.parametrize(
    "sizes", [{}, {"v_s": V_T, "v_t": V_S}, {"v_t": V_S}], ids=["s wider", "t wider", "one vocabulary"]
)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_kl_and_ce_equal_the_naive_formula_in_value_and_every_gradient(settings, sizes):
    values = tensors(**sizes)
    mine, grads = ours(values, **settings, chunk_tokens=4)
    theirs, true_grads = ours(doubled(values), naive_kl_ce, **settings)
    off = {1: settings.get("kl_weight", 1.0) == 0, 2: settings.get("ce_weight", 1.0) == 0}
    assert_equal([m for i, m in enumerate(mine) if not off.get(i)], [t for i, t in enumerate(theirs) if not off.get(i)])
    assert_equal(grads, true_grads)
    assert all(mine[i] == 0 for i, is_off in off.items() if is_off)


def test_kl_and_ce_without_biases_equal_the_naive_formula():
    values = {**tensors(), "head_bias_s": None, "head_bias_t": None}
    mine, grads = ours(values)
    theirs, true_grads = ours(doubled(values), naive_kl_ce)
    assert_equal([*mine, *grads], [*theirs, *true_grads])


def test_with_both_weights_0_nothing_is_computed_and_gradients_are_0():
    """A run on hidden states alone: the network still gets a gradient from elsewhere."""
    outputs, grads = ours(tensors(), kl_weight=0.0, ce_weight=0.0)
    assert all(o == 0 for o in outputs)
    assert all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 1000])
def test_losses_do_not_depend_on_the_chunk_size(chunk_tokens):
    whole, grads = ours(tensors(), chunk_tokens=N, temperature=2.0)
    cut, cut_grads = ours(tensors(), chunk_tokens=chunk_tokens, temperature=2.0)
    assert_equal([*cut, *cut_grads], [*whole, *grads], 2e-6)


def golden(p, q, **settings):
    """linear_kl_ce where the teacher says p and the student q, with states that are the logits."""
    h_s, h_t, eye = torch.tensor([q]).log(), torch.tensor([p]).log(), torch.eye(len(p))
    labels, one = torch.tensor([0]), torch.ones(1)
    return linear_kl_ce(h_s, eye, h_t, eye, labels, one, denom=torch.tensor(1.0), **settings)


def test_kl_is_of_the_teacher_relative_to_the_student():
    """Teacher fair, student sure: ½·ln(½/0.9) + ½·ln(½/0.1) = 0.5108; the other direction would be 0.3681."""
    assert golden([0.5, 0.5], [0.9, 0.1])[1].item() == pytest.approx(0.510826, abs=1e-5)
    assert golden([0.9, 0.1], [0.5, 0.5])[1].item() == pytest.approx(0.368064, abs=1e-5)


def test_kl_punishes_a_student_that_misses_a_mode_of_the_teacher():
    missing, covering = golden([0.5, 0.5], [0.999, 0.001])[1], golden([0.999, 0.001], [0.5, 0.5])[1]
    assert missing > 3 * covering


def test_kl_is_multiplied_by_the_temperature_squared():
    """At T = 2 the teacher's (0.8, 0.2) becomes (⅔, ⅓) and the student stays (½, ½): 4 · 0.056633."""
    assert golden([0.8, 0.2], [0.5, 0.5], temperature=2.0)[1].item() == pytest.approx(4 * 0.056633, abs=1e-5)


def test_rows_of_a_padded_vocabulary_take_no_probability_in_the_kl():
    values = tensors(v_s=V_T)
    wider = {**values, "w_t": torch.cat([values["w_t"], torch.full((5, D_T), 50.0)]),
             "head_bias_t": torch.cat([values["head_bias_t"], torch.full((5,), 50.0)])}  # fmt: skip
    assert_equal(ours(wider)[0], ours(values)[0], 1e-6)


def filtered(seed=0, *, n=N, d_s=D_S, d_t=D_T, width=WIDTH) -> dict:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "h_t": (n, d_t),
        "w_t": (width, d_t),
        "b_t": (width,),
        "h_s": (n, d_s),
        "w_s": (width, d_s),
        "b_s": (width,),
    }
    weights = torch.rand(n, generator=g) + 0.5
    weights[[0, 4]] = 0.0
    values = {k: torch.randn(*shape, generator=g) for k, shape in shapes.items()}
    return {**values, "token_weight": weights, "denom": torch.tensor(11.0)}


def naive_mse(h_t, w_t, b_t, h_s, w_s, b_s, token_weight, denom, kind):
    total = 0.0
    for i, weight in enumerate(token_weight):
        s = h_s[i] if w_s is None else w_s @ h_s[i] + b_s
        t = h_t[i] if w_t is None else w_t @ h_t[i] + b_t
        square = sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        values = {"mse": square / len(t), "nmse": square / (t @ t + 1e-6), "cosine": 1 - s @ t / (s.norm() * t.norm())}
        total = total + weight * values[kind]
    return total / denom


SIDES = {
    "both filtered": {},
    "raw teacher": {"w_t": None, "b_t": None},
    "raw student": {"w_s": None, "b_s": None},
    "both raw": {"w_t": None, "b_t": None, "w_s": None, "b_s": None},
}


@pytest.mark.parametrize("kind", ["nmse", "mse", "cosine"])
@pytest.mark.parametrize("side", SIDES)
def test_the_layer_loss_equals_the_naive_formula_in_value_and_every_gradient(kind, side):
    values = {**filtered(width=D_T, d_s=D_T if "student" in side or "raw" in side else D_S), **SIDES[side]}
    trained = ("h_s", "w_s", "b_s")
    mine, grads = ours(values, filtered_mse, trained, kind=kind, chunk_tokens=5)
    theirs, true_grads = ours(doubled(values), naive_mse, trained, kind=kind)
    assert_equal([mine, *grads], [theirs, *true_grads])


def heads(vocab=V_S, width=WIDTH, **settings) -> Head:
    torch.manual_seed(3)
    norm = torch.nn.LayerNorm(width)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm.requires_grad_(False)
    weight = torch.nn.Parameter(torch.randn(vocab, width))
    return Head(**{"tail": (norm,), "weight": weight, "bias": None, "softcap": None, "logit_scale": 1.0, **settings})


HEADS = {
    "norm": {},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5},
    "bias, no tail": {"bias": torch.randn(V_S), "tail": ()},
}


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_stage_one_s_loss_equals_the_naive_formula_in_value_and_every_gradient(settings):
    head, base = heads(**settings), tensors()
    values = {k: base[k] for k in ("labels", "token_weight", "denom")}
    values |= {"h": base["h_s"], "filter_w": torch.randn(WIDTH, D_S), "filter_b": torch.randn(WIDTH)}
    trained = ("h", "filter_w", "filter_b")

    def naive(h, filter_w, filter_b, labels, token_weight, denom):
        norm = head.tail[0] if head.tail else None
        states = h @ filter_w.T + filter_b
        if norm:
            mean, variance = states.mean(1, keepdim=True), states.var(1, correction=0, keepdim=True)
            states = (states - mean) / (variance + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()
        z = [naive_logits(s, head.weight.double(), head.bias, head.softcap, head.logit_scale) for s in states]
        terms = [-w * row.log_softmax(0)[y] for row, y, w in zip(z, labels, token_weight, strict=True) if y != IGNORED]
        return sum(terms) / denom

    mine, grads = ours(values, filtered_ce, trained, head=head, chunk_tokens=5)
    head_grad, head.weight.grad = head.weight.grad, None
    theirs, true_grads = ours(doubled(values), naive, trained)
    assert_equal([mine, *grads, head_grad], [theirs, *true_grads, head.weight.grad])


def test_with_no_valid_token_loss_and_gradients_are_0():
    nothing = {"labels": torch.full((N,), IGNORED), "denom": torch.tensor(0.0)}
    outputs, grads = ours({**tensors(), **nothing})
    assert all(o == 0 for o in outputs) and all(g.count_nonzero() == 0 for g in grads)
    masked = {**filtered(), "token_weight": torch.zeros(N), "denom": torch.tensor(0.0)}
    for kind in ("nmse", "mse", "cosine"):
        loss, grads = ours(masked, filtered_mse, ("h_s", "w_s", "b_s"), kind=kind)
        assert loss == 0 and all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_stands_in_masked_tokens_reaches_nothing(poison):
    values = tensors()
    masked = (values["labels"] == IGNORED) | (values["token_weight"] == 0)
    clean = ours(values, temperature=2.0)
    bad = {k: torch.where(masked[:, None], poison, values[k]) for k in ("h_s", "h_t")}
    outputs, grads = ours({**values, **bad}, temperature=2.0)
    assert all(torch.equal(a, b) for a, b in zip([*outputs, *grads], [*clean[0], *clean[1]], strict=True))
    assert grads[0][masked].count_nonzero() == 0
    for kind in ("nmse", "mse", "cosine"):
        values = filtered()
        rows = values["token_weight"] == 0
        bad = {k: torch.where(rows[:, None], poison, values[k]) for k in ("h_s", "h_t")}
        loss, grads = ours({**values, **bad}, filtered_mse, ("h_s", "w_s", "b_s"), kind=kind)
        clean_loss, clean_grads = ours(values, filtered_mse, ("h_s", "w_s", "b_s"), kind=kind)
        assert torch.equal(loss, clean_loss)
        assert all(torch.equal(a, b) for a, b in zip(grads, clean_grads, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_student_that_is_the_teacher_has_kl_exactly_0_with_gradient_exactly_0(temperature):
    values = tensors(v_s=301, v_t=301)
    same = {"h_t": values["h_s"], "w_t": values["w_s"], "head_bias_t": values["head_bias_s"]}
    outputs, grads = ours({**values, **same}, ce_weight=0.0, temperature=temperature)
    assert outputs[0] == outputs[1] == 0
    assert all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("kind", ["nmse", "mse", "cosine"])
def test_a_student_with_the_teacher_s_states_and_filters_has_layer_loss_0(kind):
    values = filtered()
    same = {"h_s": values["h_t"], "w_s": values["w_t"], "b_s": values["b_t"]}
    loss, grads = ours({**values, **same}, filtered_mse, ("h_s", "w_s", "b_s"), kind=kind)
    bound = 1e-6 if kind == "cosine" else 0.0
    assert loss.abs() <= bound
    assert all(g.abs().max() <= bound for g in grads)


def test_nmse_does_not_change_with_the_scale_of_both_sides_and_mse_does():
    values = {**filtered(), "b_t": torch.zeros(WIDTH), "b_s": torch.zeros(WIDTH)}
    scaled = {**values, "h_s": values["h_s"] * 8, "h_t": values["h_t"] * 8}
    assert filtered_mse(**scaled, kind="nmse").item() == pytest.approx(
        filtered_mse(**values, kind="nmse").item(), rel=1e-4
    )
    assert filtered_mse(**scaled, kind="mse").item() == pytest.approx(
        64 * filtered_mse(**values, kind="mse").item(), rel=1e-4
    )


def plain_bf16(h_s, w_s, h_t, w_t, labels, token_weight, denom, head_bias_s, head_bias_t):
    """What one writes without thinking: bf16 logits, F.cross_entropy and F.kl_div on their fp32 copies."""
    functional, rows = torch.nn.functional, (labels != IGNORED) & (token_weight > 0)
    z_s, z_t = (functional.linear(h, w, b).float() for h, w, b in ((h_s, w_s, head_bias_s), (h_t, w_t, head_bias_t)))
    kl = functional.kl_div(z_s.log_softmax(-1), z_t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    ce = functional.cross_entropy(z_s, labels, ignore_index=IGNORED, reduction="none")
    return ((kl + ce) * token_weight)[rows].sum() / denom, (kl * token_weight)[rows].sum() / denom


def test_bf16_is_no_less_exact_than_a_plain_bf16_implementation():
    worst = torch.zeros(2, 5)
    for seed in range(8):
        values = tensors(seed, n=64, d_s=64, d_t=96, v_s=300, v_t=300, dtype=torch.bfloat16)
        values |= {"w_s": values["w_s"] * 0.1, "w_t": values["w_t"] * 0.1}
        true, true_grads = ours(doubled(values), naive_kl_ce)
        for side, (loss, settings) in enumerate([(linear_kl_ce, {"chunk_tokens": 16}), (plain_bf16, {})]):
            mine, grads = ours(values, loss, **settings)
            pairs = zip([*mine[:2], *grads], [*true[:2], *true_grads], strict=True)
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
            worst[side] = torch.maximum(worst[side], torch.tensor(errors))
    assert (worst[0] <= worst[1] * 1.05).all(), worst


def test_the_gradient_of_a_bf16_weight_loses_nothing_over_many_chunks():
    values = tensors(n=1024, d_s=16, d_t=16, dtype=torch.bfloat16)
    _, true = ours(doubled(values), naive_kl_ce)
    for chunk_tokens in (1, 1024):
        _, grads = ours(values, chunk_tokens=chunk_tokens)
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(grads[1:], true[1:], strict=True)]
        assert max(errors) < 0.004, (chunk_tokens, errors)  # half a unit in bf16's last place


def test_only_the_total_has_a_gradient():
    values = {**tensors(), "h_s": tensors()["h_s"].requires_grad_()}
    total, kl, ce = linear_kl_ce(**values)
    assert total.requires_grad and not kl.requires_grad and not ce.requires_grad


def test_the_denominator_counts_labels_that_exist_and_weigh_something():
    labels = torch.tensor([[1, IGNORED, 3, 4]])
    batch = Batch(labels, labels, torch.tensor([[1.0, 1.0, 0.0, 0.25]]), None)
    assert count_valid([batch, batch]).item() == 4


def measure(loss: str, tokens: int, wide: int, *, grad=True, narrow=32, chunk=32) -> int:
    """Peak bytes of one forward and backward; `wide` is the vocabulary, or the filters' width."""
    torch.manual_seed(0)
    h, h_t = torch.randn(tokens, narrow, requires_grad=True), torch.randn(tokens, narrow)
    w, w_t = torch.randn(wide, narrow, requires_grad=True), torch.randn(wide, narrow)
    labels, ones, denom = torch.randint(0, wide, (tokens,)), torch.ones(tokens), torch.tensor(float(tokens))
    square = torch.randn(narrow, narrow, requires_grad=True)
    settings = {"denom": denom, "chunk_tokens": chunk}
    calls = {
        "kl_ce": lambda: linear_kl_ce(h, w, h_t, w_t, labels, ones, **settings)[0],
        "mse": lambda: filtered_mse(h_t, w_t, None, h, w, None, ones, **settings),
        "filter ce": lambda: filtered_ce(h, square, None, Head((), w, None, None, 1.0), labels, ones, **settings),
        "naive": lambda: plain_bf16(h, w, h_t, w_t, labels, ones, denom, None, None)[0],
        "naive mse": lambda: (h @ w.T - h_t @ w_t.T).square().sum(-1).mean(),
    }
    with torch.set_grad_enabled(grad):
        return peak_bytes(lambda: calls[loss]().backward() if grad else calls[loss]())


@pytest.mark.parametrize(("loss", "contrast"), [("kl_ce", "naive"), ("filter ce", "naive"), ("mse", "naive mse")])
def test_memory_beyond_one_chunk_does_not_grow_with_tokens_times_vocabulary(loss, contrast):
    chunk, narrow = 32, 32
    for tokens, wide in itertools.product((512, 1024), (2048, 4096)):
        one_chunk, gradients = chunk * wide * 4, (tokens + wide) * narrow * 4
        assert measure(loss, tokens, wide) <= 5 * one_chunk + 3 * gradients, (tokens, wide)
        assert measure(contrast, tokens, wide) >= 2 * tokens * wide * 4  # the meter sees whole logits
    for wide in (2048, 4096):
        more_tokens = measure(loss, 1024, wide) - measure(loss, 512, wide)
        assert abs(more_tokens) <= 512 * narrow * 4 * 3 < 512 * wide * 4 / 8


@pytest.mark.parametrize("loss", ["kl_ce", "mse", "filter ce"])
def test_evaluation_makes_no_gradient_buffers(loss):
    tokens, wide, narrow, chunk = 256, 2048, 256, 8
    without = measure(loss, tokens, wide, narrow=narrow, chunk=chunk, grad=False)
    assert without < wide * narrow * 4 / 2 < measure(loss, tokens, wide, narrow=narrow, chunk=chunk)
