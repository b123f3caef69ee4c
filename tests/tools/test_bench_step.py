"""The step of the benchmark is the trainer's own call."""

from unittest.mock import create_autospec

import torch

from ted_scale import train as loop
from tools.bench.step import TrainerArm
from tools.bench.step_parts import Stopwatch


def test_the_benchmark_s_step_gives_train_every_argument(monkeypatch):
    """`samples` added one, and the benchmark failed at its first step."""
    called = create_autospec(loop.train, return_value="progress")
    monkeypatch.setattr(loop, "train", called)
    arm = TrainerArm.__new__(TrainerArm)
    arm.stage = arm.engine = arm.teacher = arm.filters = arm.guard = arm.numbers = arm.progress = None
    monkeypatch.setattr("tools.bench.step.lend", lambda *_: None)
    arm.step([], Stopwatch(torch.device("cpu")))
    assert arm.progress == "progress" and called.call_count == 1
