"""On a CUDA device: an early teacher has a stream of its own, and what it gives is whole when the student reads it."""

import time

import pytest
import torch
from plain import build, cut, make_batch, make_world

from ted_scale.distill.reading import Reading
from ted_scale.distill.signal import Weights
from ted_scale.distill.teacher import Teacher
from ted_scale.models.streamed import stream_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ON = Weights(ce=0.5, kl=2.0, layer=3.0)
LONG = 50_000_000  # cycles: tens of milliseconds


@pytest.fixture
def body(tmp_path):
    parts = build(make_world(tmp_path), filters={"width": 16})
    parts.teacher.keep_filtered(parts.student.filters_t.cuda())
    return parts.teacher.body.cuda()


def micro_batches() -> list:
    return [
        micro.moved(lambda t: t.cuda()) for seed in range(3) for micro in cut(make_batch(seed=seed, documents=True))
    ]


def read(body, together: int, early: bool, cycles: int = 0) -> tuple[list, float]:
    """(what the student reads of each micro-batch, seconds); it takes long to read it, and longer to learn from it."""
    teacher, batches, seen = Teacher(body, body, together=together, early=early), micro_batches(), []
    reading = Reading(teacher, batches, [ON] * len(batches))
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in batches:
        signal = reading.signal(ON)
        torch.cuda._sleep(cycles // 4)
        seen.append([t.clone() for t in (*signal.layers_NE, signal.last_NE)])
        del signal
        reading.ahead()
        torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    return seen, time.perf_counter() - began


@pytest.mark.parametrize("slow", ["teacher", "student"])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("streamed", [False, True])
def test_no_signal_is_read_before_it_is_whole_or_overwritten_before_it_is_read(body, slow, together, streamed):
    expected, _ = read(body, together, early=False)
    blocks = body.network.get_submodule(body.anatomy.blocks)
    if streamed:
        body.network.cpu()
        stream_blocks(body.network, blocks, torch.device("cuda", torch.cuda.current_device()))
    if slow == "teacher":
        blocks[1].register_forward_pre_hook(lambda *_: torch.cuda._sleep(LONG))
    seen, _ = read(body, together, early=True, cycles=LONG if slow == "student" else 0)
    assert len(seen) == 12
    for ours, plain in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_teacher_and_backward_run_at_the_same_time(body):
    """Both sleep as long; each is a kernel that leaves nearly all of the device to others."""
    body.network.get_submodule(body.anatomy.blocks)[1].register_forward_pre_hook(lambda *_: torch.cuda._sleep(LONG))
    read(body, 1, early=True, cycles=LONG)
    serial, early = (read(body, 1, early=early, cycles=LONG)[1] for early in (False, True))
    assert early < 0.75 * serial
