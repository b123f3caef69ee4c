"""A corpus of many shards: few of them are open at a time, whoever reads, and it starts within seconds."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import numpy
import pytest
import torch
from corpus import counting_documents, data_section, write_shard

from ted_scale.base import patience
from ted_scale.base.errors import Gone, UserError
from ted_scale.corpora import reader
from ted_scale.corpora.output import sealed
from ted_scale.corpora.reader import BLOCK, OPEN_SHARDS, Shard, opened
from ted_scale.corpora.shards import read_index
from ted_scale.data.stream import open_stream

VOCAB = 60000


def many_shards(folder, count):
    """Hard links of signed shards: as many files to open, in a second. Many file systems allow only some 65,000 of one file."""
    for number in range(count):
        one = folder / "one" / f"shard-{number // 20_000}"
        if number % 20_000 == 0:
            signed_shard(one)
        for ending in (".bin", ".idx", ".json"):
            os.link(f"{one}{ending}", folder / f"web-{number + 1:05d}{ending}")
    return str(folder / "web")


def signed_shard(prefix):
    write_shard(prefix, counting_documents([30] * 20))
    idx_sha256, bin_sha256 = (hashlib.sha256(Path(f"{prefix}{e}").read_bytes()).hexdigest() for e in (".idx", ".bin"))
    facts = {"tokens": 600, "max_token_id": 599, "bin_bytes": 1200, "idx_sha256": idx_sha256, "bin_sha256": bin_sha256}
    Path(f"{prefix}.json").write_text(json.dumps({**facts, "tokenizer_digest": "a" * 64, "documents": 20}))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """400 shards, which would take 1200 descriptors if all were open."""
    return many_shards(tmp_path_factory.mktemp("many"), 400)


@pytest.fixture(scope="module")
def stream(shards):
    return open_stream(data_section(shards, seq_len=32), 1, VOCAB)


def target(link):
    with contextlib.suppress(FileNotFoundError):
        return str(link.readlink())
    return ""


def open_files(shards):
    """Of these shards alone: another test's error may still hold a file or a socket."""
    return sum(target(link).startswith(shards) for link in Path("/proc/self/fd").iterdir())


def mappings(shards):
    return sum(shards in line for line in Path("/proc/self/maps").read_text().splitlines())


def sound(window):
    return (window.labels - window.tokens)[window.labels % 600 != 0] == 1


def test_few_files_are_open_for_any_number_of_shards_and_none_is_mapped(stream, shards):
    """A page fault on a map holds Python's lock for as long as a file server pauses: a healthy rank was declared dead."""
    most = 0
    for position in range(2000):
        assert sound(stream.sample(position)).all()
        if position % 100 == 0:
            most = max(most, open_files(shards))
            assert mappings(shards) == 0
    assert 0 < most <= 2 * OPEN_SHARDS


def megatron_corpus(prefix, lengths, draw):
    """By megatron's own builder: documents of several sequences, some of them empty, and documents without any."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in lengths:
        parts = draw.multinomial(length, [0.4, 0.4, 0.2]) if draw.random() < 0.5 else [length] * bool(length)
        builder.add_document(torch.from_numpy(draw.integers(1, 50000, length).astype(numpy.uint16)), list(parts))
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("kind", ["even", "short first", "long first", "many empty"])
def test_tokens_and_documents_are_those_that_megatron_reads(tmp_path, kind):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    draw = numpy.random.default_rng(7)
    lengths = draw.integers(0, 20, 6 * BLOCK)
    if kind != "even":
        lengths[: 3 * BLOCK] = {"short first": 1, "long first": 200, "many empty": 0}[kind]
    prefix = megatron_corpus(tmp_path / "made", lengths.tolist(), draw)
    theirs, shard = IndexedDataset(prefix), Shard(read_index(prefix))
    tokens, total = numpy.concatenate([theirs[s] for s in range(len(theirs))]), int(lengths.sum())
    begins = numpy.append(theirs.index.sequence_pointers // 2, total)[theirs.document_indices]
    for low in [0, total - 1, *draw.integers(0, total, 200).tolist()]:
        high = min(total, low + int(draw.integers(1, 3000)))
        assert shard.first_document(low) == numpy.searchsorted(begins[:-1], low)
        assert (shard.tokens(low, high) == tokens[low:high]).all()
        found = begins[:-1][(low <= begins[:-1]) & (begins[:-1] < high)]
        assert numpy.array_equal(shard.document_starts(low, high), found)


def test_a_read_that_fails_is_tried_again_with_files_opened_anew(tmp_path, monkeypatch):
    stream = open_stream(data_section(write_shard(tmp_path / "web", counting_documents([30] * 20))), 1, VOCAB)
    expected, failures = stream.sample(0).tokens.tolist(), [errno.ESTALE, errno.EIO]

    def fails(descriptor, count, start):
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return real(descriptor, count, start)

    real, before = os.pread, opened(stream.parts["web"].shards[0].files)
    monkeypatch.setattr(os, "pread", fails)
    assert stream.sample(0).tokens.tolist() == expected
    assert opened(stream.parts["web"].shards[0].files) is not before
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    failures += [errno.EIO] * 100
    with pytest.raises(Gone, match=r"web must be readable, but was not for 0\.2 s \(Input/output error\)"):
        stream.sample(0)


def test_concurrent_threads_do_not_close_a_shard_that_another_one_reads(stream, monkeypatch):
    monkeypatch.setattr(reader, "opened", lru_cache(maxsize=2)(opened.__wrapped__))
    expected = [stream.sample(position).tokens for position in range(300)]
    wrong = []

    def read(first):
        for position in range(first, first + 300):
            if not numpy.array_equal(stream.sample(position % 300).tokens, expected[position % 300]):
                wrong.append(position)

    threads = [threading.Thread(target=read, args=(first,)) for first in (0, 70, 150, 220)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stream_can_be_sent_to_another_process(stream):
    sent = pickle.loads(pickle.dumps(stream))
    assert all(numpy.array_equal(sent.sample(p).tokens, stream.sample(p).tokens) for p in range(20))


@pytest.mark.parametrize("place", [-2, 900, 1 << 40])
def test_a_document_that_begins_outside_its_shard_holds_out_nothing(tmp_path, place):
    """A flipped bit in a pointer was a border between text to train on and text held out."""
    prefix = write_shard(tmp_path / "shard", counting_documents([30] * 20))
    index, pointers = tmp_path / "shard.idx", 34 + 4 * 20  # behind the header and the lengths
    content = bytearray(index.read_bytes())
    content[pointers + 8 * 10 : pointers + 8 * 11] = (2 * place).to_bytes(8, "little", signed=True)
    index.write_bytes(content)
    with pytest.raises(
        UserError, match=r"shard\.idx must hold lengths that add up to its tokens, and documents in rising order"
    ):
        open_stream(data_section(prefix, validation=0.5), 1, VOCAB)


def test_a_replaced_shard_is_read_again(tmp_path):
    first = [
        open_stream(data_section(write_shard(tmp_path / "a", [[low] * 100])), 1, VOCAB).sample(0) for low in (5, 7)
    ]
    assert [set(window.tokens) for window in first] == [{5}, {7}]


HUNDRED_THOUSAND = """
import os, re, resource, sys, time; sys.path[:0] = ["tests/harness", "."]
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from corpus import data_section, steps
from ted_scale.data.stream import open_stream
def memory(of):
    return int(re.search(of + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
data, before, began = data_section(sys.argv[1], seq_len=256, validation=0.01), memory("VmRSS"), time.monotonic()
stream = open_stream(data, 1, 60000)
batches = steps(stream, samples_per_step=512, micro_batch=64)
next(batches)
first, began = time.monotonic() - began, time.monotonic()
open_stream(data, 1, 60000)
again = time.monotonic() - began
print(f"{first:.1f} s to the first step, {again:.1f} s to list again, {memory('VmHWM') - before} MiB")
for _ in range(10):
    next(batches)
"""


@pytest.mark.soak
def test_a_hundred_thousand_shards_start_in_half_a_minute_under_a_limit_of_1024_descriptors(tmp_path):
    many_shards(tmp_path, 100_000)
    command = [sys.executable, "-c", HUNDRED_THOUSAND, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    first, again, memory = (float(number) for number in re.findall(r"[\d.]+(?= s| MiB)", done.stdout))
    assert first < 30 and again < first and memory < 250


def test_a_corpus_with_a_missing_shard_is_refused_by_its_manifest_and_a_single_shard_is_not(tmp_path):
    for number in (1, 2, 3):
        write_shard(tmp_path / f"web-{number:05d}", [[1, 2, 3] * 30])
    totals = {"documents": 3, "tokens": 270, "empty": 0, "skipped": 0, "sources": []}
    shards = [{"name": f"web-{number:05d}", "sidecar_sha256": ""} for number in (1, 2, 3)]
    manifest = sealed({**totals, "shards": shards})
    (tmp_path / "web.manifest.json").write_text(json.dumps(manifest))
    assert open_stream(data_section(str(tmp_path / "web")), 1, VOCAB).sample(0)
    for ending in (".bin", ".idx"):
        (tmp_path / "web-00002").with_suffix(ending).unlink()
    for path in (tmp_path / "web", tmp_path):
        with pytest.raises(
            UserError, match=r"must hold the shards that .*web.manifest.json lists, but .*web-00002 is missing"
        ):
            open_stream(data_section(str(path)), 1, VOCAB)
    assert open_stream(data_section(str(tmp_path / "web-00001")), 1, VOCAB).sample(0)
