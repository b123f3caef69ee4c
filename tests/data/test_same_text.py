"""All ranks read the same text, and a stage reads from its start to its end what was listed at its start."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
from corpus import counting_documents, write_shard
from tiny import make_run

from ted_scale import validate as validation
from ted_scale.base.errors import Gone, UserError
from ted_scale.checkpoints.progress import Progress
from ted_scale.corpora import corpus
from ted_scale.data import same_text
from ted_scale.data.same_text import open_together
from ted_scale.distill.stages import stages_of
from ted_scale.feed import open_feed

RANKS = 3


@pytest.fixture
def run(tmp_path):
    """A corpus of four shards, in blend beside one of a single shard."""
    for number in range(4):
        put(tmp_path, number)
    write_shard(tmp_path / "other", counting_documents([50] * 30))
    corpora = [{"path": str(tmp_path / name), "validation": 0.1} for name in ("web", "other")]
    return make_run(tmp_path, method="kd", data={"seq_len": 8, "corpora": corpora})


def put(folder, number):
    return write_shard(folder / "web" / f"web-{number + 1:05d}", counting_documents([25] * 20, first=500 * number))


class Ranks:
    """Threads as ranks: what one gathers is what all of them brought."""

    def __init__(self, monkeypatch, run, patience_s=60.0):
        monkeypatch.setattr(same_text, "gather", self.gather)
        monkeypatch.setattr(same_text, "PAUSE_S", 0.01)
        monkeypatch.setattr(same_text, "PATIENCE_S", patience_s)
        monkeypatch.setattr(corpus, "read_shards", partial(self.listing, corpus.read_shards))
        self.run, self.barrier, self.brought, self.listings = run, threading.Barrier(RANKS), {}, [0] * RANKS
        self.stale = lambda rank, listings, shards: shards

    def gather(self, value):
        self.brought[self.number()] = value
        self.barrier.wait(30)
        everyone = [self.brought[rank] for rank in range(RANKS)]
        self.barrier.wait(30)
        return everyone

    def number(self) -> int:
        return int(threading.current_thread().name.removeprefix("rank_"))

    def listing(self, read, path, stream):
        if not path.endswith("web"):
            return read(path, stream)
        self.listings[self.number()] += 1
        return self.stale(self.number(), self.listings[self.number()], read(path, stream))

    def open(self):
        """What each rank gets, or the error that it ends with."""
        with ThreadPoolExecutor(RANKS, "rank") as pool:
            gate = threading.Barrier(RANKS)  # one task a thread
            return list(pool.map(self.one, [gate] * RANKS))

    def one(self, gate):
        gate.wait(30)
        try:
            return open_together(partial(open_feed, self.run, stages_of(self.run)[0], Progress(), 60000))[0]
        except (Gone, UserError) as error:
            return error


def test_ranks_that_list_other_shards_list_again_until_they_read_the_same(run, monkeypatch):
    ranks = Ranks(monkeypatch, run)
    ranks.stale = lambda rank, listings, shards: shards[:-1] if rank == 1 and listings < 3 else shards
    streams = ranks.open()
    assert ranks.listings == [3, 3, 3]
    assert len({stream.interval for stream in streams}) == 1 and streams[1].parts["web"].tokens == 1800


def test_ranks_that_go_on_listing_other_shards_end_with_one_sentence(run, monkeypatch):
    ranks = Ranks(monkeypatch, run, patience_s=0.1)
    ranks.stale = lambda rank, listings, shards: shards[:-1] if rank == 1 else shards
    ends = ranks.open()
    assert all(isinstance(end, Gone) and str(end) == str(ends[0]) for end in ends)
    assert "corpus web must be the same text on all ranks, but is 4 shards of 2,000 tokens, 200 held out" in str(
        ends[0]
    )
    assert "on ranks 0, 2 and 3 shards of 1,500 tokens, 150 held out" in str(ends[0])


def test_shards_in_another_order_are_another_text(run, monkeypatch):
    ranks = Ranks(monkeypatch, run, patience_s=0.1)
    ranks.stale = lambda rank, listings, shards: shards[::-1] if rank == 2 else shards
    assert all(isinstance(end, Gone) for end in ranks.open())


def test_a_mistake_that_one_rank_finds_ends_all_ranks_with_its_sentence(run, monkeypatch):
    def refuse(rank, listings, shards):
        if rank == 2:
            raise UserError("corpus file web.idx must exist, but is missing")
        return shards

    ranks = Ranks(monkeypatch, run, patience_s=0.1)
    ranks.stale = refuse
    said = "corpus file web.idx must exist, but is missing (so on rank 2, not on the others)"
    ends = ranks.open()
    assert [type(end) for end in ends] == [UserError] * RANKS and {str(end) for end in ends} == {said}
    assert ranks.listings[0] > 1  # a shard may just be arriving


def test_ranks_read_again_what_a_file_server_did_not_let_some_or_all_of_them_read(run, monkeypatch):
    def fail(rank, listings, shards):
        if listings < 2 or (rank == 1 and listings < 4):
            raise Gone("corpus file web.idx must be readable")
        return shards

    ranks = Ranks(monkeypatch, run)
    ranks.stale = fail
    assert len({stream.interval for stream in ranks.open()}) == 1 and ranks.listings == [4, 4, 4]
    ranks = Ranks(monkeypatch, run, patience_s=0.1)
    ranks.stale = lambda rank, listings, shards: fail(rank, 0, shards)
    ends = ranks.open()
    assert [type(end) for end in ends] == [Gone] * RANKS


def test_a_mistake_that_all_ranks_find_ends_them_at_once(run, monkeypatch, tmp_path):
    (tmp_path / "web" / "web-00002.bin").unlink()
    ranks = Ranks(monkeypatch, run)
    ends = ranks.open()
    assert all(isinstance(end, UserError) for end in ends) and ranks.listings == [1, 1, 1]


def test_a_shard_that_arrives_during_a_stage_is_read_from_the_next_stage_on(run, monkeypatch, tmp_path):
    stage, measured = stages_of(run)[0], []
    stream, progress, _ = open_feed(run, stage, Progress(), 60000)
    windows = {name: held.count for name, held in stream.held_out.items()}
    monkeypatch.setattr(validation, "measure_both", lambda plan, student, streams, *_: measured.append(streams))
    put(tmp_path, 4)
    metrics = SimpleNamespace(aside=nullcontext)
    validation.validate(SimpleNamespace(run=run, teacher=None), None, metrics, stream.held_out, None, progress)
    assert {name: held.count for name, held in measured[0].items()} == windows == {"web": 24, "other": 18}
    after, _, said = open_feed(run, stage, progress, 60000)
    assert after.held_out["web"].parts["web"].tokens == 250 and "other text" in "".join(said)
