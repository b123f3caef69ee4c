"""The loader: one order for any number of ranks, nothing read too far ahead, and no thread left behind."""

import gc
import statistics
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from corpus import counting_documents, data_section, digest, of_all_ranks, write_shard
from launching import run_ranks
from scenarios import rows
from tiny import PRETRAIN, make_corpus, make_model, make_run, write_run

from ted_scale.base.errors import UserError
from ted_scale.data import blend
from ted_scale.data import loader as loading
from ted_scale.data.loader import Loader
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
    return Loader(**{"prefetch": 2, "micro_batch": 1, "rank": 0, "world": 1, "device": "cpu"} | settings)


@pytest.fixture
def asked(monkeypatch):
    """The first position of every step that is read."""
    found, positions = [], loading.rank_positions
    monkeypatch.setattr(loading, "rank_positions", lambda first, *rest: found.append(first) or positions(first, *rest))
    return found


@pytest.mark.parametrize(("first", "then"), [(1, 8), (2, 1), (4, 2), (8, 4)])
def test_the_order_is_the_same_for_any_number_of_ranks_also_when_it_changes_on_resume(corpora, stream, first, then):
    """From an arbitrary position on, and with a resume by what a checkpoint keeps in the middle."""
    straight = digest(batch(stream, [position]) for position in range(13, 13 + 64))
    kept = blend.from_record(blend.as_record(stream.interval))
    data = data_section(*corpora, seq_len=16, attention="document", weights=[3, 1])
    resumed = open_stream(data, 1, VOCAB, kept, 37)
    halves = of_all_ranks(stream, first, 13, 37) + of_all_ranks(resumed, then, 37, 77)
    assert digest(halves) == straight


def test_stretches_follow_each_other_and_nothing_is_read_past_a_border(stream, asked):
    other = stream._replace(interval=blend.follow(stream.interval, 24, stream.interval.domains, (100, 900), 16))
    with closing(loader()) as opened:
        first = [micro for step in opened.steps(stream, start=0, stop=24, samples_per_step=8) for micro in step]
        assert asked == [0, 8, 16]
        second = [micro for step in opened.steps(other, start=24, stop=40, samples_per_step=8) for micro in step]
        assert asked == [0, 8, 16, 24, 32]
    assert digest(first) == digest(batch(stream, [position]) for position in range(24))
    assert digest(second) == digest(batch(other, [position]) for position in range(24, 40))
    assert digest(second) != digest(batch(stream, [position]) for position in range(24, 40))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_more_than_prefetch_steps_are_read_ahead(stream, asked, prefetch):
    with closing(loader(prefetch=prefetch)) as opened:
        drawn = opened.steps(stream, start=0, samples_per_step=8)
        for step in range(4):
            next(drawn)
            assert asked == [8 * i for i in range(step + 1 + prefetch)]


def test_a_stretch_that_is_left_early_does_not_change_the_next(stream):
    with closing(loader()) as opened:
        next(opened.steps(stream, start=0, samples_per_step=8))
        (step,) = opened.steps(stream, start=80, stop=88, samples_per_step=8)
    assert digest(step) == digest(batch(stream, [position]) for position in range(80, 88))


def test_a_mistake_in_a_corpus_is_raised_with_its_sentence(tmp_path):
    prefix = write_shard(tmp_path / "far", [[1, 2, 300, 4, 5, 6, 7, 8, 9]])
    far = open_stream(data_section(prefix), 1, 300)
    with closing(loader()) as opened, pytest.raises(UserError) as error:
        next(opened.steps(far, start=0, samples_per_step=1))
    assert str(error.value) == (
        f"corpus shard {prefix} of data.corpora[0] ({prefix}) must hold token ids in 0..299 (vocabulary size 300), but holds "
        "300; tokenize it with the model's own tokenizer"
    )


def prefetchers() -> set:
    return {t for t in threading.enumerate() if t.name.startswith("ted_scale prefetch")}


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "forgotten"])
def test_the_thread_ends_with_its_loader(stream, closed):
    gc.collect()
    others = prefetchers()
    opened = loader()
    drawn = opened.steps(stream, start=0, samples_per_step=8)
    next(drawn)
    (thread,) = prefetchers() - others
    if closed:
        opened.close()
    del opened, drawn
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


OPENED = """
import sys; sys.path.insert(0, "tests/harness")
from ted_scale.data.loader import Loader
loader = Loader(prefetch=2, micro_batch=2, rank=0, world=1, device="cpu")
from corpus import data_section
from ted_scale.data.stream import open_stream
steps = loader.steps(open_stream(data_section({path!r}), 1, 60000), start=0, samples_per_step=8)
next(steps)
"""


def test_opening_prints_nothing_and_a_loader_that_is_not_closed_delays_no_exit(corpora):
    done = subprocess.run(
        [sys.executable, "-c", OPENED.format(path=corpora[0])], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.alone
def test_two_ranks_wait_less_than_a_hundredth_of_a_step_for_data(tmp_path):
    make_model(tmp_path / "student", "gpt2")
    make_corpus(tmp_path / "corpus")
    train = {"steps": 25, "tokens_per_step": 1024, "micro_batch": 4}
    run = make_run(tmp_path, method="ce", teacher=None, data={"seq_len": 128}, train=train)
    run_ranks(2, PRETRAIN, "--config", write_run(tmp_path / "run.toml", run))
    waits = [row["perf/data_wait_ms"] / row["perf/step_ms"] for row in rows(tmp_path, "tiny") if "loss/ce" in row]
    assert statistics.median(waits[5:]) < 0.01


def test_a_step_may_have_a_thousand_micro_batches(stream):
    drawn = loader().steps(stream, start=0, stop=2000, samples_per_step=1000)
    assert [len(step) for step in drawn] == [1000, 1000]
