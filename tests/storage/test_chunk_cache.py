"""The chunks on disk: what is found is what was put, within the bound, whatever happens to the file or its writers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ted_scale.storage.chunk_cache import ChunkCache, geometry, key_of
from ted_scale.storage.objects import Object

CHUNK = 4096
BOUND = 1 << 20


def thing(name="web.bin", version="v1"):
    return Object(f"s3://bucket/{name}", 10**9, version)


def key(number, **named):
    return key_of(thing(**named), number, CHUNK)


def content(number):
    return random.Random(number).randbytes(CHUNK)


def on_disk(path):
    return path.stat().st_blocks * 512


def test_a_chunk_is_found_again_also_by_another_process_and_after_a_restart(tmp_path):
    ChunkCache(tmp_path / "chunks", BOUND, CHUNK).put(key(1), content(1))
    again = ChunkCache(tmp_path / "chunks", BOUND, CHUNK)
    assert again.get(key(1)) == content(1) and again.get(key(2)) is None


def test_another_version_of_the_object_is_another_chunk(tmp_path):
    cache = ChunkCache(tmp_path / "chunks", BOUND, CHUNK)
    cache.put(key(1), content(1))
    assert cache.get(key(1, version="v2")) is None and cache.get(key(1, name="code.bin")) is None


@pytest.mark.parametrize("bound", [0, 3000, 40_000, BOUND, 10 * BOUND])
def test_the_file_never_exceeds_its_bound(tmp_path, bound):
    cache = ChunkCache(tmp_path / "chunks", bound, CHUNK)
    for number in range(600):
        cache.put(key(number), content(number))
    kept = sum(cache.get(key(number)) == content(number) for number in range(600))
    assert not bound or kept == 0 or on_disk(tmp_path / "chunks") <= bound
    assert kept >= min(500, 0.6 * bound // CHUNK)
    assert geometry(bound, CHUNK).size <= bound or not bound


def test_the_least_recently_used_chunk_is_replaced_first(tmp_path):
    cache = ChunkCache(tmp_path / "chunks", 18 * CHUNK, CHUNK)  # one set
    ways = cache.shape.ways
    assert cache.shape.sets == 1
    for number in range(ways):
        cache.put(key(number), content(number))
    assert cache.get(key(0)) == content(0)
    cache.put(key(ways), content(ways))
    assert [number for number in range(ways + 1) if cache.get(key(number)) is None] == [1]


def test_the_file_follows_a_changed_bound(tmp_path):
    path = tmp_path / "chunks"
    for bound in (BOUND, BOUND // 4, BOUND // 2):
        cache = ChunkCache(path, bound, CHUNK)
        for number in range(300):
            assert cache.get(key(number)) in (None, content(number))
            cache.put(key(number), content(number))
        assert on_disk(path) <= bound


def test_a_chunk_whose_bytes_changed_on_disk_counts_as_absent(tmp_path):
    cache = ChunkCache(tmp_path / "chunks", BOUND, CHUNK)
    for number in range(100):
        cache.put(key(number), content(number))
    draw, size = random.Random(1), (tmp_path / "chunks").stat().st_size
    with (tmp_path / "chunks").open("r+b") as file:
        for _ in range(3000):
            file.seek(draw.randrange(size))
            file.write(draw.randbytes(8))
    found = [cache.get(key(number)) for number in range(100)]
    assert None in found and all(got in (None, content(number)) for number, got in enumerate(found))


WRITER = """
import sys; sys.path.insert(0, "tests/storage")
from pathlib import Path
from test_chunk_cache import *
cache, start = ChunkCache(Path(sys.argv[1]), BOUND, CHUNK), int(sys.argv[2])
print("ready", flush=True)
for i in range(10**9):
    number = start * i % 500  # another order in every process: they write the same slots at once
    found = cache.get(key(number))
    if found is None:
        cache.put(key(number), content(number))
    elif found != content(number):
        sys.exit(f"chunk {number} is wrong")
"""


@pytest.mark.long  # starts programs
def test_concurrent_writers_that_are_killed_leave_no_wrong_chunk(tmp_path):
    path = tmp_path / "chunks"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(s)], stdout=subprocess.PIPE, text=True) for s in (1, 3, 7)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    cache, deadline = ChunkCache(path, BOUND, CHUNK), time.monotonic() + 2
    found = 0
    while time.monotonic() < deadline:
        number = random.randrange(500)
        got = cache.get(key(number))
        found += got is not None
        assert got in (None, content(number))
    states = [writer.poll() for writer in writers]
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert states == [None] * 3 and found > 50
    assert all(cache.get(key(number)) in (None, content(number)) for number in range(500))
    assert on_disk(path) <= BOUND


def test_a_full_disk_disables_the_cache_and_does_not_stop_the_run(tmp_path, caplog, monkeypatch):
    cache = ChunkCache(tmp_path / "chunks", BOUND, CHUNK)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for number in range(3):
        cache.put(key(number), content(number))
        assert cache.get(key(number)) is None
    said = [record.message for record in caplog.records]
    assert said == [f"chunks are not kept on disk, because {tmp_path}/chunks cannot be used: No space left on device"]


def test_a_folder_that_cannot_be_written_disables_the_cache_and_does_not_stop_the_run(tmp_path, caplog):
    Path(tmp_path / "file").write_text("")
    cache = ChunkCache(tmp_path / "file" / "chunks", BOUND, CHUNK)
    cache.put(key(1), content(1))
    assert cache.get(key(1)) is None
    assert "chunks are not kept on disk" in caplog.text
