"""The loop frees the teacher's signal before backward, reads the next one first where the teacher is early, and updates once."""

import weakref
from types import SimpleNamespace

import pytest

from ted_scale import train as loop
from ted_scale.checkpoints.progress import Progress
from ted_scale.distill.signal import Weights
from ted_scale.metrics.clock import Clock


class Signal:
    """Something that a weak reference can follow."""


class Student:
    """Has the methods that the loop calls; notes which signals that it has read are alive when backward begins."""

    device = None

    def __init__(self):
        self.seen, self.alive_in_backward, self.backwards, self.told = [], [], 0, []
        vitals = SimpleNamespace(begin=lambda _: None, send=lambda: None, read=lambda *_: {})
        self.module = SimpleNamespace(vitals=vitals)

    def __call__(self, batch, signal, weights, denom, denom_t):
        self.seen.append(weakref.ref(signal))
        return SimpleNamespace(total=1.0)

    def backward(self, *_, **__):
        self.alive_in_backward += [ref() is not None for ref in self.seen]
        self.backwards += 1

    def set_gradient_accumulation_boundary(self, is_last):
        self.told.append((self.backwards, is_last))

    def step(self):
        self.told.append((self.backwards, "step"))


class Teacher:
    """Notes how many backwards there were before each of its calls."""

    stream, together = None, 1

    def __init__(self, student, early: bool):
        self.student, self.early, self.called = student, early, []

    def each(self, batches, weights):
        self.called.append(self.student.backwards)
        return [Signal()]


@pytest.mark.parametrize(("early", "called"), [(False, [0, 1]), (True, [0, 0])])
def test_the_teacher_s_signal_is_freed_before_backward(monkeypatch, early, called):
    for name in ("count_valid", "set_rates", "for_engine"):
        monkeypatch.setattr(loop, name, lambda *_: None)
    monkeypatch.setattr(loop.pulse, "step", lambda _: None)
    student, nothing = Student(), lambda *_, **__: None
    stage = SimpleNamespace(
        of_micro_batches=lambda _, count, scale, floor: [Weights(1.0, 1.0, 0.0)] * count, rate=nothing, samples_per_step=1,
        balances=False, last_step=1, verifies=nothing, validates=nothing, writes_samples=nothing, saves=nothing,
        run=SimpleNamespace(
            data=SimpleNamespace(seq_len=1), train=SimpleNamespace(reduce_once=False), loss=SimpleNamespace(tokens="targets")
        ),
    )  # fmt: skip
    guard = SimpleNamespace(add=nothing, gather=nothing, decide=Progress, read=dict, finite=True, stopping=False)
    clock = Clock(SimpleNamespace(type="cpu"))
    metrics = SimpleNamespace(timed=lambda items, _: items, clock=clock, add=nothing, alert=nothing)
    settings = {
        "progress": Progress(),
        "verify": nothing,
        "validate": nothing,
        "write_samples": nothing,
        "save": nothing,
    }
    teacher = Teacher(student, early)
    loop.train(stage, student, teacher, [["one", "two"]], guard, metrics, **settings)
    assert len(student.seen) == 2 and student.alive_in_backward == [False, False, False]
    assert teacher.called == called
    assert student.told == [(0, False), (1, True), (2, True), (2, "step")]  # DeepSpeed is told before each backward
