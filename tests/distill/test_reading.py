"""When the teacher is called in a step, and with what: no loss depends on it, and a device never reads what is not there yet."""

from contextlib import contextmanager

import pytest
import torch
from plain import build, cut, make_batch, make_world
from torch.multiprocessing.reductions import StorageWeakRef

from ted_scale.data.packing import joined, pack
from ted_scale.distill.normalization import count_valid
from ted_scale.distill.reading import Reading
from ted_scale.distill.signal import Weights
from ted_scale.distill.teacher import Teacher

ON, WITHOUT = Weights(ce=0.5, kl=2.0, layer=3.0), Weights(ce=0.5, kl=0.0, layer=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def losses(parts, together: int, early: bool, each: list[Weights], documents: bool) -> list[float]:
    """A step of four micro-batches, in the order of train.py."""
    teacher = Teacher(parts.teacher.body, parts.teacher.body, together=together, early=early)
    batches, found = cut(make_batch(documents=documents)), []
    reading, denom = Reading(teacher, batches, each), count_valid(batches)
    for batch, weights in zip(batches, each, strict=True):
        value = parts.student(batch, reading.signal(weights), weights, denom).total
        reading.ahead()
        value.backward()
        found.append(value.item())
    assert not reading.asked and not reading.signals
    return found


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("each", [[ON] * 4, [ON, WITHOUT, ON, ON]], ids=["always", "sometimes"])
@pytest.mark.parametrize(("together", "early"), [(1, True), (2, False), (3, True), (9, True)])
def test_the_losses_are_those_of_a_teacher_that_reads_one_at_a_time(world, together, early, each, documents):
    parts = build(world)
    plain = losses(parts, 1, False, each, documents)
    assert len(set(plain)) == 4
    assert losses(parts, together, early, each, documents) == pytest.approx(plain, abs=1e-6)


def test_an_early_teacher_alone_changes_no_bit(world):
    parts = build(world)
    assert losses(parts, 1, True, [ON] * 4, True) == losses(parts, 1, False, [ON] * 4, True)


class Noting:
    """Stands in for a teacher: what it was called with, in one list with what else happens."""

    def __init__(self, said: list, together: int, early: bool, stream=None):
        self.said, self.together, self.early, self.stream = said, together, early, stream

    def each(self, batches, weights):
        self.said.append(f"teacher {''.join(batches)}")
        return [f"signal {batch}" for batch in batches]


def order(together: int, early: bool, each: list[Weights], stream=None, said=None) -> list[str]:
    said = [] if said is None else said
    reading = Reading(Noting(said, together, early, stream), list("abcd"), each)
    for batch, weights in zip("abcd", each, strict=True):
        signal = reading.signal(weights)
        assert signal == (f"signal {batch}" if weights.asks else None)
        said.append(f"student {batch}")
        reading.ahead()
        said.append("backward")
    return [word for word in said if word != "backward"] if stream is None else said


@pytest.mark.parametrize(
    ("together", "early", "expected"),
    [
        (1, False, "t a, s a, t b, s b, t c, s c, t d, s d"),
        (2, False, "t ab, s a, s b, t cd, s c, s d"),
        (3, False, "t abc, s a, s b, s c, t d, s d"),
    ],
)
def test_a_call_reads_so_many_micro_batches(together, early, expected):
    named = expected.replace("t ", "teacher ").replace("s ", "student ").split(", ")
    assert order(together, early, [ON] * 4) == named


def test_micro_batches_that_do_not_ask_are_left_out_of_a_call():
    assert order(2, False, [ON, WITHOUT, ON, ON]) == [
        "teacher ac", "student a", "student b", "student c", "teacher d", "student d"
    ]  # fmt: skip


def test_on_a_device_a_call_waits_for_the_student_s_forward_and_runs_beside_the_backward(monkeypatch):
    """One stream's word to another, as a fake accelerator hears it: `side` is the teacher's."""
    said: list[str] = []
    main, side = Stream("main", said), Stream("side", said)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", side.within)
    order(2, True, [ON] * 4, side, said)
    assert said == [
        "side waits for main", "on side", "teacher ab", "off side", "main waits for side", "student a", "backward",
        "main waits for side", "student b",
        "side waits for main", "on side", "teacher cd", "off side", "backward",
        "main waits for side", "student c", "backward",
        "main waits for side", "student d", "backward",
    ]  # fmt: skip


class Stream:
    def __init__(self, name: str, said: list[str]):
        self.name, self.said = name, said

    def wait_stream(self, other) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(self, stream):
        assert stream is self
        self.said.append(f"on {self.name}")
        yield
        self.said.append(f"off {self.name}")


def test_a_call_s_memory_is_freed_with_its_last_micro_batch(world):
    """Two signals of one call share it; between two calls there is none."""
    body = build(world).teacher.body
    teacher = Teacher(body, body, together=2, early=True)
    reading = Reading(teacher, cut(make_batch()), [ON] * 4)
    alive = []
    for _ in range(4):
        signal = reading.signal(ON)
        memory = StorageWeakRef(signal.last_NE.untyped_storage())
        del signal
        alive.append(not memory.expired())
    assert alive == [True, False, True, False]


def test_joined_packings_are_the_packing_of_all_rows():
    begins = [torch.rand(rows, 12, generator=torch.Generator().manual_seed(rows)).lt(0.3).numpy() for rows in (1, 3, 2)]
    together = pack(torch.cat([torch.from_numpy(b) for b in begins]).numpy())
    found = joined([pack(b) for b in begins])
    assert found.lengths == together.lengths
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found[:2], together[:2], strict=True))
