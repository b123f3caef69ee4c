"""A shard that is not sound is refused with one sentence that names the file."""

import functools
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from corpus import write_shard

from ted_scale.base.errors import UserError
from ted_scale.corpora.corpus import read_corpus
from ted_scale.corpora.local import expand
from ted_scale.corpora.shards import check, check_vocabulary, read_index

DOCUMENTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


@pytest.fixture
def prefix(tmp_path):
    return write_shard(tmp_path / "shard", DOCUMENTS)


def patched(path, offset, new):
    content = bytearray(Path(path).read_bytes())
    content[offset : offset + len(new)] = new
    Path(path).write_bytes(content)


def cut(path, size):
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def remove(path):
    Path(path).unlink()


BROKEN = {
    "missing_idx": (lambda p: remove(p + ".idx"), ".idx must exist, but is missing"),
    "missing_bin": (lambda p: remove(p + ".bin"), ".bin must exist, but is missing"),
    "foreign_idx": (lambda p: patched(p + ".idx", 0, b"PK"), ".idx must be a Megatron index, but starts with"),
    "other_version": (
        lambda p: patched(p + ".idx", 9, b"\x02"),
        "must be a Megatron index of version 1, but is version 2",
    ),
    "unknown_dtype": (lambda p: patched(p + ".idx", 17, b"\x63"), "must hold integer tokens, but has dtype code 99"),
    "float_dtype": (lambda p: patched(p + ".idx", 17, b"\x07"), "must hold integer tokens, but has dtype code 7"),
    "cut_in_header": (lambda p: cut(p + ".idx", 20), ".idx must hold a 34-byte header, but is truncated"),
    "cut_idx": (lambda p: cut(p + ".idx", 60), "must have the size that its counts ask for, but is truncated"),
    "cut_bin": (lambda p: cut(p + ".bin", 16), ".bin must hold 18 bytes as its .idx says, but is 16 long"),
    "open_last_document": (lambda p: patched(p + ".idx", 94, struct.pack("<q", 2)), "must end its last document"),
    "foreign_sidecar": (lambda p: Path(p + ".json").write_text("[1]"), ".json must describe its shard"),
    "stale_sidecar": (
        lambda p: Path(p + ".json").write_text('{"tokens": 8, "max_token_id": 9}'),
        "counts 8 tokens where",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_shard_is_refused_with_a_sentence_naming_the_file(prefix, case):
    harm, sentence = BROKEN[case]
    harm(prefix)
    with pytest.raises(UserError) as error:
        read_index(prefix)
    assert sentence in str(error.value) and prefix in str(error.value)


def test_a_sound_shard_is_described_from_its_header(prefix):
    index = read_index(prefix)
    assert (index.sequences, index.documents, index.tokens, str(index.dtype)) == (3, 3, 9, "uint16")
    assert index.recorded is None


@pytest.mark.parametrize("documents", [[], [[]]], ids=["no_documents", "only_an_empty_one"])
def test_a_shard_without_tokens_is_refused(tmp_path, documents):
    with pytest.raises(UserError, match="must hold tokens, but is empty"):
        read_index(write_shard(tmp_path / "empty", documents))


def test_a_prefix_an_ending_a_family_and_a_folder_name_the_same_shards(tmp_path):
    both = [write_shard(tmp_path / "c" / f"text-0000{i}", DOCUMENTS) for i in (2, 1)][::-1]
    assert expand(tmp_path / "c") == expand(tmp_path / "c" / "text") == both
    assert expand(both[0]) == expand(both[0] + ".bin") == expand(both[0] + ".idx") == both[:1]


def test_a_folder_with_a_shard_that_lost_its_index_is_refused(tmp_path):
    prefixes = [write_shard(tmp_path / name, DOCUMENTS) for name in ("a", "b")]
    remove(prefixes[1] + ".idx")
    with pytest.raises(UserError, match=r"b\.idx must exist"):
        [read_index(prefix) for prefix in expand(tmp_path)]


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must hold .bin/.idx pairs, but holds none"):
        expand(tmp_path)


SIGNED = {"tokens": 9, "max_token_id": 9, "tokenizer_digest": "a" * 64, "idx_sha256": None, "bin_sha256": "b" * 64}


def many_of_another_tool(folder, count):
    """Names without numbers, as other tools give them; sidecars as ours."""
    for number in range(count):
        prefix = folder / f"part_{number}_text"
        write_shard(prefix, DOCUMENTS)
        digest = hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
        Path(f"{prefix}.json").write_text(json.dumps(SIGNED | {"idx_sha256": digest, "documents": 3}))
    return str(folder)


class Looks:
    """Counts what is asked of the file system about a folder, as a file server would, and how much of it at one time."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.stats, self.opens, self.running, self.most = folder, 0, 0, 0, 0
        self.lock = threading.Lock()
        for module, name, kind in (
            (os, "stat", "stats"),
            (os, "lstat", "stats"),
            (os, "open", "opens"),
            (io, "open", "opens"),
        ):
            monkeypatch.setattr(module, name, functools.partial(self.look, getattr(module, name), kind))

    def look(self, real, kind, path, *arguments, **rest):
        if not str(path).startswith(self.folder):
            return real(path, *arguments, **rest)
        with self.lock:
            setattr(self, kind, getattr(self, kind) + 1)
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.001)
        with self.lock:
            self.running -= 1
        return real(path, *arguments, **rest)


def test_a_corpus_is_opened_with_few_looks_at_each_shard_many_at_a_time_and_opened_again_with_none_inside(
    tmp_path, monkeypatch
):
    """Where a file server takes 1 ms for each look, 4,000 shards took 68 s."""
    path, count, fixed = many_of_another_tool(tmp_path, 200), 200, 20
    looks = Looks(path, monkeypatch)
    read_corpus(path, None)
    assert looks.stats <= 3 * count + fixed and looks.opens <= 2 * count + fixed and looks.most >= 4
    looks.stats = looks.opens = 0
    read_corpus(path, None)
    assert looks.stats <= 3 * count + fixed and looks.opens == 0


def test_a_shard_takes_little_memory(tmp_path):
    """A corpus may have a hundred thousand shards, and every process of a node holds them."""
    path = many_of_another_tool(tmp_path, 200)
    read_corpus(path, None)
    check.cache_clear()
    tracemalloc.start()
    shards = read_corpus(path, None)
    held = tracemalloc.get_traced_memory()[0] / len(shards)
    tracemalloc.stop()
    assert held < 1500  # bytes


def test_an_id_outside_the_vocabulary_is_refused_by_the_sidecar_before_tokens_are_read(tmp_path):
    prefix = write_shard(tmp_path / "shard", DOCUMENTS, sidecar={"tokens": 9, "max_token_id": 9})
    check_vocabulary(read_index(prefix), 10)
    with pytest.raises(UserError, match=rf"{prefix} must hold token ids in 0..8 \(vocabulary size 9\), but holds 9"):
        check_vocabulary(read_index(prefix), 9)


def test_checking_shards_imports_neither_torch_nor_megatron():
    code = "import sys, ted_scale.corpora.shards; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_name_that_no_file_can_have_is_a_missing_file():
    with pytest.raises(UserError, match="must exist, but is missing"):
        read_index("corpus\0")


@pytest.mark.parametrize("read", [read_index, expand])
def test_a_name_that_is_too_long_is_one_sentence(read):
    with pytest.raises(UserError, match="File name too long"):
        read("x" * 300)
