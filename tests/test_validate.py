"""A validation of text without targets: no loss and no traceback, and nothing follows from a loss that is not there."""

import contextlib
from types import SimpleNamespace

import pytest
from tiny import make_run

from ted_scale import feed
from ted_scale import validate as validation
from ted_scale.base.errors import UserError
from ted_scale.checkpoints.progress import Progress
from ted_scale.validate import Loss

COUNTED, UNTAUGHT = Loss(6.0, 3.0), Loss(0.0, 0.0)


class Rows:
    """Metrics that keep their rows, as rank 0's do."""

    writes = True

    def __init__(self):
        self.rows, self.aside = [], contextlib.nullcontext

    def write(self, step, tokens, values):
        self.rows.append(values)

    def has_already(self, step, prefix):
        return any(key.startswith(prefix) for row in self.rows for key in row)


@pytest.fixture
def plan(tmp_path):
    corpora = [{"path": name, "validation": 0.1} for name in ("chat", "web")]
    return SimpleNamespace(run=make_run(tmp_path, method="kd", data={"corpora": corpora}), teacher=None)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(validation, "log_line", lambda line, _: lines.append(line))
    validation.say_untaught.cache_clear()
    return lines


def measured(monkeypatch, of_student, of_teacher=None):
    for module in (validation, feed):
        monkeypatch.setattr(module, "measure_both", lambda *_: (of_student, of_teacher or {}))


def write(plan, metrics):
    progress, stopping = validation.write_losses(plan, None, metrics, {"chat": None}, None, Progress(), False)
    assert not stopping
    return progress


def test_a_corpus_without_targets_is_left_out_of_the_row_and_named_once(monkeypatch, plan, said):
    losses = {"chat": UNTAUGHT, "web": COUNTED}
    measured(monkeypatch, losses, losses)
    metrics = Rows()
    assert [write(plan, metrics).validation for _ in range(2)] == [2.0, 2.0]
    assert set(metrics.rows[0]) == {
        f"val/{of}{side}{what}" for of in ("", "web/") for side in ("", "teacher_") for what in ("loss", "ppl")
    }
    assert len(said) == 1 and said[0].startswith("corpus chat has no val/loss") and "raise validation.tokens" in said[0]


def test_without_any_target_no_checkpoint_is_the_best_and_a_resume_does_not_measure_again(monkeypatch, plan, said):
    measured(monkeypatch, {"chat": UNTAUGHT})
    metrics, stage = Rows(), SimpleNamespace(validates=lambda _: True, asks_suite=lambda _: False)
    assert validation.missing(plan, metrics, stage, Progress())
    assert write(plan, metrics).validation is None
    assert metrics.rows == [{"val/tokens": 0.0}] and len(said) == 1
    assert not validation.missing(plan, metrics, stage, Progress())


def test_an_adaptive_blend_refuses_a_corpus_without_targets(monkeypatch, plan):
    measured(monkeypatch, {"chat": UNTAUGHT, "web": COUNTED}, {"chat": UNTAUGHT, "web": COUNTED})
    with pytest.raises(UserError, match=r"corpus chat must hold out text with a target .* raise validation\.tokens"):
        feed.weigh(plan, None, Rows(), None, SimpleNamespace(held_out={}, parts={}), Progress())
