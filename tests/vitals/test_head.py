"""Numbers of the output against torch's own losses and autograd, for vocabularies of different sizes."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from ted_scale.kernels.formulas.logits import LogitLoss
from ted_scale.vitals import head
from ted_scale.vitals.head import Side

TOKENS = 24


def side(width: int, vocabulary: int, seed: int, softcap=None, scale=1.0) -> Side:
    g = torch.Generator().manual_seed(seed)
    states, weight = torch.randn(TOKENS, width, generator=g), torch.randn(vocabulary, width, generator=g)
    return Side(states, weight, torch.randn(vocabulary, generator=g), softcap, scale)


def logits(x: Side, states=None):
    y = linear(x.states if states is None else states, x.weight, x.bias) * x.scale
    return x.softcap * torch.tanh(y / x.softcap) if x.softcap else y


def drawn(vocabulary: int):
    g = torch.Generator().manual_seed(5)
    counted = torch.ones(TOKENS, dtype=torch.bool)
    counted[-4:] = False
    return torch.randint(0, vocabulary, (TOKENS,), generator=g), counted


SIDES = {
    "equal": (side(8, 30, 0), side(12, 30, 1)),
    "teacher has more": (side(8, 30, 0), side(12, 40, 1)),
    "student has more": (side(8, 40, 0), side(12, 30, 1)),
    "caps and scales": (side(8, 30, 0, 5.0, 0.5), side(12, 30, 1, 3.0, 2.0)),
}


def measured(student, teacher, labels, counted, f: LogitLoss, floor=None) -> dict[str, float]:
    return head.numbers(head.sums(student, teacher, labels, counted, f, floor), f)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", SIDES)
def test_numbers_are_those_of_torch_and_autograd(name, temperature, monkeypatch):
    student, teacher = SIDES[name]
    monkeypatch.setattr(head, "rows_per_chunk", lambda *_: 7)
    vocabulary, known = len(student.weight), len(teacher.weight)
    labels, counted = drawn(vocabulary)
    kl, ce = 0.7, 0.3
    caps = (student.softcap or 0.0, teacher.softcap or 0.0, student.scale, teacher.scale)
    found = measured(student, teacher, labels, counted, LogitLoss(temperature, kl, ce, *caps, known >= vocabulary))

    h, shared = student.states.clone().requires_grad_(), min(vocabulary, known)
    y_s, y_t = logits(student, h), logits(teacher)
    log_q, log_p = ((y[:, :shared] / temperature).log_softmax(1) for y in (y_s, y_t))
    terms = {
        "ce": ce * cross_entropy(y_s[counted], labels[counted], reduction="sum"),
        "kl": kl * temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)[counted].sum(),
    }
    of_ce, of_kl = (torch.autograd.grad(term, h, retain_graph=True)[0].flatten() for term in terms.values())
    y_s = y_s.detach()
    assert float(found["kl_to_ce"]) == pytest.approx(float(of_kl.norm() / of_ce.norm()), rel=1e-4)
    assert float(found["kl_ce_cosine"]) == pytest.approx(float(torch.cosine_similarity(of_kl, of_ce, 0)), abs=1e-5)

    p, q = y_t[counted, :shared].softmax(1), y_s[counted, :shared].softmax(1)
    assert float(found["kl_1"]) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert float(found["agreement"]) == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))
    assert float(found["student_ce"]) == pytest.approx(float(cross_entropy(y_s[counted], labels[counted])), rel=1e-5)
    there = counted & (labels < known)
    assert float(found["teacher_ce"]) == pytest.approx(float(cross_entropy(y_t[there], labels[there])), rel=1e-5)
    for which, y in (("s", y_s), ("t", y_t)):
        sure = (y[counted].softmax(1).amax(1) >= 0.99).float().mean()
        assert float(found[f"saturated_{which}"]) == pytest.approx(float(sure))


def test_without_a_weight_for_ce_there_is_no_ratio():
    student, teacher = SIDES["equal"]
    found = measured(student, teacher, *drawn(30), LogitLoss(1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, True))
    assert "kl_to_ce" not in found and "kl_ce_cosine" in found


def test_tokens_below_the_floor_of_entropy_have_no_gradient_of_kl():
    student, teacher = SIDES["equal"]
    f = LogitLoss(1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, True)
    assert measured(student, teacher, *drawn(30), f, floor=torch.tensor(99.0))["kl_to_ce"] == 0
