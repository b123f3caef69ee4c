"""Every loss term against a naive fp64 formula, one token at a time, and the properties that training relies on."""

import pytest
import torch

from ted_scale.data.stream import Batch
from ted_scale.distill.normalization import count_valid
from ted_scale.kernels import filtered_ce, filtered_mse, linear_kl_ce
from ted_scale.kernels.formulas.logits import LogitLoss, soften, whole_rows
from ted_scale.kernels.tokens import IGNORED
from ted_scale.models.anatomy import Head

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


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN then
    yield
    torch.use_deterministic_algorithms(False)


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


def naive_kl(p, q):
    return (p * (p / q).log()).sum()


NAIVE = {
    "forward": naive_kl,
    "reverse": lambda p, q: naive_kl(q, p),
    "jsd": lambda p, q: (naive_kl(p, (p + q) / 2) + naive_kl(q, (p + q) / 2)) / 2,
}


def naive_entropy(p):
    return -(p * p.log()).sum()


def naive_buckets(p, q, top_k: int):
    """p's likeliest tokens, and all others as one."""
    if not 0 < top_k < len(p):
        return p, q
    top, rest = p.argsort(descending=True).split([top_k, len(p) - top_k])
    return (torch.cat([x[top], x[rest].sum()[None]]) for x in (p, q))


def naive_kl_ce(
    h_s, w_s, h_t, w_t, labels, token_weight, denom, head_bias_s, head_bias_t, temperature=1.0, kl_weight=1.0,
    ce_weight=1.0, softcap_s=None, softcap_t=None, logit_scale_s=1.0, logit_scale_t=1.0, divergence="forward", top_k=0,
    skip_below=0.0,
):  # fmt: skip
    kl = ce = 0.0
    shared = min(len(w_s), len(w_t))
    for i, label in enumerate(labels.tolist()):
        if label == IGNORED or token_weight[i] <= 0:
            continue
        z_s = naive_logits(h_s[i], w_s, head_bias_s, softcap_s, logit_scale_s)
        z_t = naive_logits(h_t[i], w_t, head_bias_t, softcap_t, logit_scale_t)
        p, q = (z[:shared].div(temperature).exp() for z in (z_t, z_s))
        p, q = p / p.sum(), q / q.sum()
        if naive_entropy(p) >= skip_below:
            kl = kl + token_weight[i] * temperature**2 * NAIVE[divergence](*naive_buckets(p, q, top_k))
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
@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_kl_and_ce_equal_the_naive_formula_in_value_and_every_gradient(mode, settings, sizes, monkeypatch):
    for name, size in (("LOGITS", 3), ("SLICE", 7)):
        monkeypatch.setattr(f"ted_scale.kernels.logit_loss_strict.{name}", size)
    values = tensors(**sizes)
    mine, grads = ours(values, **settings, mode=mode, chunk_tokens=4)
    theirs, true_grads = ours(doubled(values), naive_kl_ce, **settings)
    off = {1: settings.get("kl_weight", 1.0) == 0, 2: settings.get("ce_weight", 1.0) == 0}
    assert_equal([m for i, m in enumerate(mine) if not off.get(i)], [t for i, t in enumerate(theirs) if not off.get(i)])
    assert_equal(grads, true_grads)
    assert all(mine[i] == 0 for i, is_off in off.items() if is_off)


OTHERS = {
    "reverse": {"divergence": "reverse"},
    "jsd": {"divergence": "jsd"},
    "top 4": {"top_k": 4},
    "reverse, top 4": {"divergence": "reverse", "top_k": 4},
    "jsd, top 1": {"divergence": "jsd", "top_k": 1},
    "more than there are": {"top_k": 40},
}


@pytest.mark.parametrize(
    "sizes", [{}, {"v_s": V_T, "v_t": V_S}, {"v_t": V_S}], ids=["s wider", "t wider", "one vocabulary"]
)
@pytest.mark.parametrize("settings", [s for name, s in SETTINGS.items() if name != "ce only"], ids=str)
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_every_divergence_equals_the_naive_formula_in_value_and_every_gradient(other, settings, sizes):
    values, settings = tensors(**sizes), {**settings, **other}
    mine, grads = ours(values, **settings, chunk_tokens=4)
    theirs, true_grads = ours(doubled(values), naive_kl_ce, **settings)
    kept = slice(0, 2 if settings.get("ce_weight") == 0 else 3)
    assert_equal([*mine[kept], *grads], [*theirs[kept], *true_grads])


def entropies_of(values: dict, shared: int, temperature=1.0, softcap_t=None, logit_scale_t=1.0, **_):
    values = doubled(values)
    each = zip(values["h_t"], [values["w_t"]] * len(values["h_t"]), strict=True)
    z = [naive_logits(h, w, values["head_bias_t"], softcap_t, logit_scale_t)[:shared] for h, w in each]
    return torch.stack([naive_entropy((row / temperature).softmax(0)) for row in z])


@pytest.mark.parametrize("sizes", [{}, {"v_s": V_T, "v_t": V_S}], ids=["s wider", "t wider"])
@pytest.mark.parametrize("settings", [s for name, s in SETTINGS.items() if name != "ce only"], ids=str)
@pytest.mark.parametrize("other", [{}, OTHERS["reverse"], OTHERS["jsd, top 1"]], ids=str)
def test_a_token_whose_teacher_is_surer_than_the_floor_loses_its_divergence_and_keeps_its_ce(other, settings, sizes):
    values, settings = tensors(**sizes), {**settings, **other}
    true = entropies_of(values, V_T, **settings)
    floor = true.sort().values[5:7].mean().item()
    (*mine, entropies), grads = ours(values, **settings, skip_below=floor, chunk_tokens=4)
    theirs, true_grads = ours(doubled(values), naive_kl_ce, **settings, skip_below=floor)
    kept = slice(0, 2 if settings.get("ce_weight") == 0 else 3)
    assert_equal([*mine[kept], *grads], [*theirs[kept], *true_grads])
    counted = (values["labels"] != IGNORED) & (values["token_weight"] > 0)
    assert torch.allclose(entropies[counted].double(), true[counted], atol=1e-5)
    everything, _ = ours(values, **settings, skip_below=0.0)
    assert [x.item() for x in everything[:3]] == [x.item() for x in ours(values, **settings)[0]]


def test_kl_and_ce_without_biases_equal_the_naive_formula():
    values = {**tensors(), "head_bias_s": None, "head_bias_t": None}
    mine, grads = ours(values)
    theirs, true_grads = ours(doubled(values), naive_kl_ce)
    assert_equal([*mine, *grads], [*theirs, *true_grads])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_cross_entropy_alone_forms_softmax_and_gradient_in_the_memory_of_its_logits(softcap):
    """A fresh matrix would cost a CPU more time than the softmax, and as much memory as the logits."""
    z, f = torch.randn(5, V_S), LogitLoss(1.0, 0.0, 1.0, softcap, 0.0, 1.0, 1.0, False)
    labels, exact = torch.arange(5), z.double().requires_grad_()
    _, ce, dz, _ = whole_rows(z, None, labels, torch.ones(5), f, True)
    losses = torch.nn.functional.cross_entropy(soften(exact, softcap, 1.0), labels, reduction="none")
    losses.sum().backward()
    assert dz.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
    assert_equal([ce, dz], [losses, exact.grad])


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
    """linear_kl_ce of a teacher with probabilities p and a student with q; the states are the logits."""
    h_s, h_t, eye = torch.tensor([q]).log(), torch.tensor([p]).log(), torch.eye(len(p))
    labels, one = torch.tensor([0]), torch.ones(1)
    return linear_kl_ce(h_s, eye, h_t, eye, labels, one, denom=torch.tensor(1.0), **settings)


def test_kl_is_of_the_teacher_relative_to_the_student():
    """Teacher (½, ½), student (0.9, 0.1): ½·ln(½/0.9) + ½·ln(½/0.1) = 0.5108; the other direction would be 0.3681."""
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
    "bias, no tail": {"bias": torch.linspace(-2, 2, V_S), "tail": ()},
}


@pytest.mark.parametrize("narrow", [0, 3], ids=["", "lifted"])
@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_stage_one_s_loss_equals_the_naive_formula_in_value_and_every_gradient(settings, narrow):
    head, base = heads(**settings), tensors()
    values = {k: base[k] for k in ("labels", "token_weight", "denom")}
    width = narrow or WIDTH
    values |= {"h": base["h_s"], "filter_w": torch.randn(width, D_S), "filter_b": torch.randn(width)}
    values |= {"lift_w": torch.randn(WIDTH, narrow)} if narrow else {}
    trained = ("h", "filter_w", "filter_b", "lift_w")[: 3 + bool(narrow)]

    def naive(h, filter_w, filter_b, labels, token_weight, denom, lift_w=None):
        norm = head.tail[0] if head.tail else None
        states = h @ filter_w.T + filter_b
        states = states if lift_w is None else states @ lift_w.T
        if norm:
            mean, variance = states.mean(1, keepdim=True), states.var(1, correction=0, keepdim=True)
            states = (states - mean) / (variance + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()
        z = [naive_logits(s, head.weight.double(), head.bias, head.softcap, head.logit_scale) for s in states]
        terms = [-w * row.log_softmax(0)[y] for row, y, w in zip(z, labels, token_weight, strict=True) if y != IGNORED]
        return sum(terms) / denom

    mine, grads = ours(values, filtered_ce, trained, **head.filtered_ce_arguments, chunk_tokens=5)
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


@pytest.mark.parametrize("other", [OTHERS["reverse"], OTHERS["jsd, top 1"]], ids=str)
def test_masked_tokens_change_no_divergence(other):
    values = tensors()
    masked = (values["labels"] == IGNORED) | (values["token_weight"] == 0)
    bad = {k: torch.where(masked[:, None], float("nan"), values[k]) for k in ("h_s", "h_t")}
    clean, dirty = (ours(v, **other, skip_below=1.0) for v in (values, {**values, **bad}))
    assert all(torch.equal(a, b) for a, b in zip([*clean[0][:3], *clean[1]], [*dirty[0][:3], *dirty[1]], strict=True))
    assert torch.equal(clean[0][3][~masked], dirty[0][3][~masked])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_tokens_change_nothing(poison):
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


@pytest.mark.parametrize("other", [{}, *OTHERS.values()], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_student_that_is_the_teacher_has_kl_exactly_0_with_gradient_exactly_0(temperature, other):
    values = tensors(v_s=301, v_t=301)
    same = {"h_t": values["h_s"], "w_t": values["w_s"], "head_bias_t": values["head_bias_s"]}
    outputs, grads = ours({**values, **same}, ce_weight=0.0, temperature=temperature, **other)
    assert outputs[0] == outputs[1] == 0
    assert all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("side", ["h_t", "h_s"])
def test_a_side_without_a_direction_has_cosine_1_and_no_gradient(side):
    nothing = {"b_t" if side == "h_t" else "b_s": None}
    values = filtered()
    for size in (1.0, 1e4):
        bad = {**values, **nothing, "h_s": values["h_s"] * size, side: torch.zeros_like(values[side])}
        loss, grads = ours(bad, filtered_mse, ("h_s", "w_s"), kind="cosine")
        assert loss.item() == pytest.approx((values["token_weight"].sum() / values["denom"]).item(), rel=1e-6)
        assert all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("kind", ["nmse", "mse", "cosine"])
def test_a_student_with_the_teacher_s_states_and_filters_has_layer_loss_0(kind):
    values = filtered()
    same = {"h_s": values["h_t"], "w_s": values["w_t"], "b_s": values["b_t"]}
    loss, grads = ours({**values, **same}, filtered_mse, ("h_s", "w_s", "b_s"), kind=kind)
    assert loss == 0 and all(g.count_nonzero() == 0 for g in grads)


def test_nmse_does_not_change_with_the_scale_of_both_sides_and_mse_does():
    values = {**filtered(), "b_t": torch.zeros(WIDTH), "b_s": torch.zeros(WIDTH)}
    scaled = {**values, "h_s": values["h_s"] * 8, "h_t": values["h_t"] * 8}
    assert filtered_mse(**scaled, kind="nmse").item() == pytest.approx(
        filtered_mse(**values, kind="nmse").item(), rel=1e-4
    )
    assert filtered_mse(**scaled, kind="mse").item() == pytest.approx(
        64 * filtered_mse(**values, kind="mse").item(), rel=1e-4
    )


def test_only_the_total_has_a_gradient():
    values = {**tensors(), "h_s": tensors()["h_s"].requires_grad_()}
    total, kl, ce = linear_kl_ce(**values)
    assert total.requires_grad and not kl.requires_grad and not ce.requires_grad


def test_the_denominator_counts_labels_that_are_not_ignored_and_have_a_weight():
    labels = torch.tensor([[1, IGNORED, 3, 4]])
    batch = Batch(labels, labels, torch.tensor([[1.0, 1.0, 0.0, 0.25]]), None)
    assert count_valid([batch, batch]).item() == 4
