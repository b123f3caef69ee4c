"""The loader with real worker processes: one order for any number of ranks and workers, and what happens when one dies."""

import gc
import hashlib
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from corpus import counting_documents, data_section, steps, write_shard
from scenarios import rows
from tiny import make_corpus, make_model, make_run, pretrain_command, write_run

from ted_scale.base.errors import Gone, UserError
from ted_scale.data import blend
from ted_scale.data.loader import Ahead, Loader
from ted_scale.data.stream import batch, open_stream

VOCAB = 60000


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora of documents of many lengths; a window often holds several."""
    folder = tmp_path_factory.mktemp("loader")
    big = write_shard(folder / "big", counting_documents([5, 13, 1, 30, 7, 22, 9, 40] * 20))
    return big, write_shard(folder / "small", counting_documents([6, 2, 17] * 20, first=30000))


@pytest.fixture(scope="module")
def stream(corpora):
    return open_stream(data_section(*corpora, seq_len=16, attention="document", weights=[3, 1]), 1, VOCAB)


def loader(**settings) -> Loader:
    return Loader(**{"workers": 2, "prefetch": 2, "micro_batch": 1, "rank": 0, "world": 1, "device": "cpu"} | settings)


def digest(micros) -> str:
    """Of everything that a model is given, in order."""
    found = hashlib.sha256()
    for micro in micros:
        micro.moved(lambda tensor: found.update(tensor.numpy().tobytes()))
    return found.hexdigest()


def all_ranks(stream, world: int, workers: int, start: int, stop: int) -> list:
    """The samples of all ranks in the order of their positions: micro-step first, then rank."""
    ranks = [
        steps(stream, start=start, stop=stop, samples_per_step=8, micro_batch=1, rank=r, world=world, workers=workers)
        for r in range(world)
    ]
    return [micro for step in zip(*ranks, strict=True) for micros in zip(*step, strict=True) for micro in micros]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("first", "then"), [(1, 8), (2, 1), (4, 2), (8, 4)])
def test_the_order_is_one_for_any_ranks_and_workers_also_when_they_change_on_the_way(
    corpora, stream, workers, first, then
):
    """From an arbitrary position on, and with a resume by what a checkpoint keeps in the middle."""
    straight = digest(batch(stream, [position]) for position in range(13, 13 + 64))
    kept = blend.from_dict(blend.as_dict(stream.interval))
    data = data_section(*corpora, seq_len=16, attention="document", weights=[3, 1])
    resumed = open_stream(data, 1, VOCAB, kept, 37)
    halves = all_ranks(stream, first, workers, 13, 37) + all_ranks(resumed, then, 2 - workers, 37, 77)
    assert digest(halves) == straight


@pytest.mark.parametrize("workers", [0, 2])
def test_stretches_follow_each_other_in_the_same_processes_and_nothing_is_read_past_a_border(stream, workers):
    other = stream._replace(interval=blend.follow(stream.interval, 24, stream.interval.domains, (100, 900), 16))
    asked = []
    with closing(loader(workers=workers)) as opened:
        hired = opened.hired.result()
        rows = opened._rows
        opened._rows = lambda position, samples: asked.append(position) or rows(position, samples)
        first = [micro for step in opened.steps(stream, start=0, stop=24, samples_per_step=8) for micro in step]
        assert asked == [0, 8, 16]
        second = [micro for step in opened.steps(other, start=24, stop=40, samples_per_step=8) for micro in step]
        assert asked == [0, 8, 16, 24, 32]
        assert opened.hired.result() is hired and all(worker.process.is_alive() for worker in hired)
    assert digest(first) == digest(batch(stream, [position]) for position in range(24))
    assert digest(second) == digest(batch(other, [position]) for position in range(24, 40))
    assert digest(second) != digest(batch(stream, [position]) for position in range(24, 40))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_more_than_prefetch_steps_are_under_way(stream, workers, prefetch):
    asked = []
    with closing(loader(workers=workers, prefetch=prefetch)) as opened:
        rows = opened._rows
        opened._rows = lambda position, samples: asked.append(position) or rows(position, samples)
        drawn = opened.steps(stream, start=0, samples_per_step=8)
        for step in range(4):
            next(drawn)
            assert asked == [8 * i for i in range(step + 1 + prefetch)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stretch_that_is_left_early_spoils_nothing_for_the_next(stream, workers):
    with closing(loader(workers=workers)) as opened:
        next(opened.steps(stream, start=0, samples_per_step=8))
        (step,) = opened.steps(stream, start=80, stop=88, samples_per_step=8)
    assert digest(step) == digest(batch(stream, [position]) for position in range(80, 88))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_user_s_mistake_has_the_same_sentence_from_a_worker(tmp_path, workers):
    prefix = write_shard(tmp_path / "far", [[1, 2, 300, 4, 5, 6, 7, 8, 9]])
    far = open_stream(data_section(prefix), 1, 300)
    with closing(loader(workers=workers)) as opened, pytest.raises(UserError) as error:
        next(opened.steps(far, start=0, samples_per_step=1))
    assert str(error.value) == (
        f"corpus shard {prefix} of data.corpora[0] ({prefix}) must hold token ids in 0..299 (vocabulary size 300), but holds "
        "300; tokenize it with the model's own tokenizer"
    )


def test_a_fault_of_ours_in_a_worker_comes_with_its_traceback(stream):
    with closing(loader()) as opened, pytest.raises(RuntimeError, match=r"(?s)data\.py.*KeyError: 'big'"):
        next(opened.steps(stream._replace(parts={}), start=0, samples_per_step=8))


def test_what_a_worker_cannot_fetch_ahead_is_told_by_the_read(stream):
    with closing(loader()) as opened, pytest.raises(RuntimeError, match="KeyError: 'big'"):
        worker, _ = opened.hired.result()
        for task in (stream._replace(parts={}), Ahead([0]), [0]):
            worker.send(task)
        worker.answer()


@pytest.mark.parametrize("at_work", [True, False], ids=["at_work", "before_its_first_task"])
def test_a_worker_that_is_killed_is_named_and_ends_the_run(stream, at_work):
    with closing(loader(rank=1, world=2)) as opened:
        drawn = opened.steps(stream, start=0, samples_per_step=8)
        if at_work:
            next(drawn)
        victim = opened.hired.result()[1].process
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(Gone) as error:
            for _ in range(20):
                next(drawn)
    said = (
        f"worker 1 of rank 1 (pid {victim.pid}) must read as long as the run goes, but was ended by SIGKILL; the last"
    )
    assert str(error.value).startswith(said)


def test_signals_that_ask_a_run_to_stop_end_no_worker_before_its_trainer(stream):
    with closing(loader()) as opened:
        drawn = opened.steps(stream, start=0, samples_per_step=8)
        next(drawn)
        for worker in opened.hired.result():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(worker.process.pid, number)
        assert len([next(drawn) for _ in range(8)]) == 8


def gone(pids, seconds: float) -> bool:
    """Whether no such process is left: a zombie is one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def prefetchers() -> set:
    return {t for t in threading.enumerate() if t.name.startswith("ted_scale prefetch")}


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "forgotten"])
def test_thread_and_workers_end_with_their_loader(stream, closed):
    gc.collect()
    others = prefetchers()
    opened = loader()
    drawn = opened.steps(stream, start=0, samples_per_step=8)
    next(drawn)
    (thread,) = prefetchers() - others
    pids = [worker.process.pid for worker in opened.hired.result()]
    if closed:
        opened.close()
    del opened, drawn
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive() and gone(pids, 5)


OPENED = """
import sys; sys.path.insert(0, "tests")
from ted_scale.data.loader import Loader
loaders = [Loader(workers=n, prefetch=2, micro_batch=2, rank=0, world=1, device="cpu") for n in (2, 0)]
from corpus import data_section
from ted_scale.data.stream import open_stream
stream = open_stream(data_section({path!r}), 1, 60000)
drawn = [loader.steps(stream, start=0, samples_per_step=8) for loader in loaders]
for steps in drawn:
    next(steps)
print(*(worker.process.pid for worker in loaders[0].hired.result()))
"""
KILLED = """
import time
from ted_scale.data.loader import Loader
loader = Loader(workers=2, prefetch=2, micro_batch=2, rank=0, world=1, device="cpu")
print(*(worker.process.pid for worker in loader.hired.result()), flush=True)
time.sleep(60)
"""


def test_opening_is_silent_and_loaders_that_nobody_closed_hold_no_exit_and_leave_no_process(corpora):
    """Neither where the trainer returns nor where it is killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    killed = subprocess.Popen([sys.executable, "-c", KILLED], **pipes)
    returns = subprocess.Popen([sys.executable, "-c", OPENED.format(path=corpora[0])], **pipes)
    pids = killed.stdout.readline().split()
    killed.kill()
    for process, code in ((killed, -9), (returns, 0)):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (code, "")
        pids += out.split()
    assert len(pids) == 4 and gone(pids, 10)


@pytest.mark.alone
def test_two_ranks_wait_for_no_data_and_all_end_with_one_sentence_when_a_worker_is_killed(tmp_path):
    make_model(tmp_path / "student", "gpt2")
    make_corpus(tmp_path / "corpus")
    train = {"steps": 10_000, "tokens_per_step": 1024, "micro_batch": 4}
    run = make_run(tmp_path, method="ce", teacher=None, data={"workers": 2, "seq_len": 128}, train=train)
    command = pretrain_command("--config", write_run(tmp_path / "run.toml", run), ranks=2)
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    numbers = run.folder / "metrics.jsonl"
    while launcher.poll() is None and not (numbers.exists() and numbers.read_text().count("data_wait_ms") > 25):
        time.sleep(0.1)
    everyone = psutil.Process(launcher.pid).children(recursive=True)
    workers = {p.pid: p.parent().ppid() for p in everyone if "forkserver" in " ".join(p.parent().cmdline())}
    victim = max(workers)
    os.kill(victim, signal.SIGKILL)
    said = [line for line in launcher.communicate(timeout=60)[1].splitlines() if "error" in line.lower()]
    assert launcher.returncode == 5 and len(workers) == 4 and len(said) == 1, said
    assert f"(pid {victim}) must read as long as the run goes, but was ended by SIGKILL" in said[0]
    assert gone([process.pid for process in everyone], 10)
    waits = [row["perf/data_wait_ms"] / row["perf/step_ms"] for row in rows(tmp_path, "tiny") if "loss/ce" in row]
    assert statistics.median(waits[5:]) < 0.01


def test_a_step_of_more_micro_batches_than_a_pipe_holds_does_not_hang(stream):
    drawn = loader(workers=1).steps(stream, start=0, stop=2000, samples_per_step=1000)
    assert [len(step) for step in drawn] == [1000, 1000]
