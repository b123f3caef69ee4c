"""Packs among ranks and kills: one process of a node makes them, no half file is read, and rows are those of one rank."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
from corpus import counting_documents, data_section, digest, of_all_ranks, write_masked, write_shard

from ted_scale.base import durable
from ted_scale.base.errors import UserError
from ted_scale.data import blend, packs, same_text
from ted_scale.data.stream import batch, open_stream

VOCABULARY = 1 << 16


def section(*paths, seq_len=16, folder=None, **more):
    stream = {"stream": {"folder": str(folder)}} if folder else {}
    return data_section(*paths, seq_len=seq_len, attention="document", packing="examples", **stream, **more)


def documents(count=120, first=1, seed=0):
    return counting_documents(numpy.random.default_rng(seed).integers(2, 17, count).tolist(), first=first)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A corpus with targets, and a plain one."""
    folder = tmp_path_factory.mktemp("packs")
    chat = documents()
    targets = [[int(i >= len(d) // 2) for i in range(len(d))] for d in chat]
    return write_masked(folder / "chat", chat, targets), write_shard(folder / "plain", documents(first=30000, seed=1))


@pytest.mark.parametrize(("first", "then"), [(1, 4), (2, 1), (4, 2)])
def test_rows_are_the_same_for_any_ranks_also_when_these_change_at_a_resume(corpora, first, then):
    """Tokens, labels, weights and borders of documents, over the border of an epoch, with packs that are opened anew."""
    data = section(*corpora, weights=[3, 1], validation=0.1)
    stream = open_stream(data, 1, VOCABULARY)
    end = 13 + 8 * (-(-stream.packs["chat"].counts.packs // 8) + 6)
    straight = digest(batch(stream, [position]) for position in range(13, end))
    kept = blend.from_record(blend.as_record(stream.interval))
    packs.opened.cache_clear()
    resumed = open_stream(data, 1, VOCABULARY, kept, 37)
    assert digest(of_all_ranks(stream, first, 13, 37) + of_all_ranks(resumed, then, 37, end)) == straight
    weights = batch(stream, list(range(64))).weights_BT
    assert 0.2 < weights.mean() < 0.9  # some tokens are no targets


def together(count, action):
    """`action(number)` in so many threads at once; each locks for itself, as a process does."""
    gate = threading.Barrier(count)

    def one(number):
        gate.wait(30)
        try:
            return action(number)
        except UserError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def slow_and_counted(monkeypatch, name):
    """The calls of a function of packs.py, which takes a while now."""
    calls, act = [], getattr(packs, name)

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.2)
        return act(*arguments)

    monkeypatch.setattr(packs, name, slow)
    return calls


@pytest.mark.parametrize("nodes", [1, 2])
def test_one_process_of_a_node_makes_the_packs_and_the_others_wait(tmp_path, monkeypatch, nodes):
    """Nodes that share the corpus's folder each make them, and write the same bytes."""
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # a process has a number of its own
    prefix, made = write_shard(tmp_path / "c", documents()), slow_and_counted(monkeypatch, "make")
    found = together(6, lambda n: open_stream(section(prefix, folder=tmp_path / f"node_{n % nodes}"), 1, VOCABULARY))
    assert len(made) == nodes and len({stream.packs["c"] for stream in found}) <= nodes
    assert len({stream.packs["c"].digest for stream in found}) == len(list(tmp_path.glob("c.packs-*"))) == 1


def test_what_the_maker_refuses_every_process_of_the_node_says(tmp_path, monkeypatch):
    prefix = write_masked(tmp_path / "c", [[1, 2, 3, 4]] * 3, [[0, 0, 0, 0]] * 3)
    said = together(3, lambda _: open_stream(section(prefix, folder=tmp_path / "node"), 1, VOCABULARY))
    assert len({str(error) for error in said}) == 1
    assert f"3 pieces without one, the first in document 0 of {prefix} (ted-scale inspect {prefix} --doc" in str(
        said[0]
    )


@pytest.mark.parametrize("moment", ["in the file", "before its name"])
def test_a_kill_while_packs_are_written_leaves_nothing_that_is_read(tmp_path, monkeypatch, moment):
    whole = open_stream(section(write_shard(tmp_path / "whole" / "c", documents())), 1, VOCABULARY).packs["c"]
    prefix = write_shard(tmp_path / "c", documents())
    if (pid := os.fork()) == 0:
        end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        monkeypatch.setattr(durable.os, "fsync" if moment == "before its name" else "write", end)
        open_stream(section(prefix, folder=tmp_path / "node"), 1, VOCABULARY)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.glob(".c.packs-*.part"))) == 1 and not list(tmp_path.glob("c.packs-*"))
    found = open_stream(section(prefix, folder=tmp_path / "node"), 1, VOCABULARY).packs["c"]
    assert found.digest == whole.digest


def test_ranks_with_other_packs_read_another_text(corpora):
    ours, theirs = (open_stream(section(*corpora, validation=0.1), 1, VOCABULARY) for _ in range(2))
    assert same_text.what_is_read(ours) == same_text.what_is_read(theirs)
    other = ours._replace(packs={**ours.packs, "chat": ours.packs["chat"]._replace(digest=bytes(32))})
    assert same_text.what_is_read(other)["chat"] != same_text.what_is_read(theirs)["chat"]
