"""What counts in packed rows of examples is what counts in each example alone, and loss.tokens widens it for the teacher."""

import numpy
import pytest
import torch
from corpus import write_masked
from plain import build, make_batch, make_world, own_model, run_step
from tiny import FAMILIES, MORE, VOCABULARY, make_model

from ted_scale.data.stream import batch, open_stream
from ted_scale.distill.normalization import count_for_teacher, count_valid
from ted_scale.kernels.tokens import IGNORED

LENGTHS = [14, 9, 7, 20, 11, 5]


def examples(seed=0):
    """(ids, targets) of a few examples: a prompt, an answer, and for some another turn of both."""
    rng = numpy.random.default_rng(seed)
    documents = [rng.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]
    borders = [numpy.sort(rng.choice(numpy.arange(1, length - 1), 3, replace=False)).tolist() for length in LENGTHS]
    return documents, [
        [int(a <= i < b or i >= c) for i in range(n)] for n, (a, b, c) in zip(LENGTHS, borders, strict=True)
    ]


def alone(model, documents, targets):
    """(mean, gradients) of plain transformers over the examples, one forward each, with labels of -100."""
    model.zero_grad()
    total, count = 0.0, 0
    for ids, marks in zip(documents, targets, strict=True):
        labels = torch.tensor([[token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]])
        counted = int((labels[:, 1:] != IGNORED).sum())
        total = total + model(torch.tensor([ids]), labels=labels).loss * counted
        count += counted
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_packed_examples_lose_what_each_loses_alone_in_plain_transformers(tmp_path, family):
    make_model(tmp_path / "student", family, initializer_range=0.1)
    documents, targets = examples()
    path = write_masked(tmp_path / "corpus", documents, targets)
    parts = build(
        tmp_path, method="ce", data={"attention": "document", "packing": "examples", "corpora": [{"path": path}]}
    )
    stream = open_stream(parts.plan.run.data, 1, VOCABULARY)
    rows = [batch(stream, [position]) for position in range(stream.packs["corpus"].counts.packs)]
    assert len(rows) < len(documents)
    losses, ours = run_step(parts, rows)
    loss, theirs = alone(own_model(tmp_path / "student"), documents, targets)
    assert sum(each.ce.item() for each in losses) == pytest.approx(loss, abs=1e-5)
    assert ours.keys() == {f"network.{name}" for name in theirs}
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-2  # 1e-6 is little of it
    for name, gradient in theirs.items():
        assert (ours[f"network.{name}"] - gradient).abs().max() <= 1e-6, name


def masked_batch():
    """A batch in which half of the labels are prompts."""
    whole = make_batch()
    weights = whole.weights_BT * (torch.arange(16) % 2)
    return whole, whole._replace(weights_BT=weights)


def losses_of(parts, one, weights):
    denom, denom_t = count_valid([one]), count_for_teacher(parts.plan.run.loss, [one])
    parts.student.zero_grad()
    losses = parts.student(one, parts.teacher(one, weights), weights, denom, denom_t)
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in parts.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_with_all_tokens_a_teacher_teaches_prompts_too_and_the_text_counts_targets_alone(tmp_path, mode):
    make_world(tmp_path)
    whole, masked = masked_batch()
    targets = build(tmp_path, loss={"mode": mode})
    every = build(tmp_path, loss={"mode": mode, "tokens": "all"})
    weights = targets.stage.weights(targets.stage.first_step)
    both, gradients = losses_of(every, masked, weights)
    text, of_text = losses_of(targets, masked, weights._replace(kl=0.0, layer=0.0))
    teacher, of_teacher = losses_of(targets, whole, weights._replace(ce=0.0))
    assert both.ce.item() == pytest.approx(text.ce.item(), abs=1e-6)
    assert both.kl.item() == pytest.approx(teacher.kl.item(), abs=1e-6)
    assert both.layers.tolist() == pytest.approx(teacher.layers.tolist(), abs=1e-6)
    for name, gradient in gradients.items():
        parts = [side[name] for side in (of_text, of_teacher) if name in side]
        assert torch.allclose(gradient, sum(parts), atol=1e-6), name
    narrow, _ = losses_of(targets, masked, weights)
    assert narrow.kl.item() != pytest.approx(both.kl.item(), abs=1e-4)


@pytest.mark.parametrize("stage", ["filters", "student"])
def test_by_default_every_term_counts_the_targets_alone(tmp_path, stage):
    """Labels of prompts change nothing: with them ignored instead, each number is the same."""
    parts = build(make_world(tmp_path), stage=stage)
    _, masked = masked_batch()
    ignored = masked._replace(labels_BT=masked.labels_BT.where(masked.weights_BT > 0, IGNORED))
    (ours,), gradients = run_step(parts, [masked])
    (theirs,), others = run_step(parts, [ignored])
    assert torch.equal(ours.total, theirs.total) and torch.equal(ours.layers, theirs.layers)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
