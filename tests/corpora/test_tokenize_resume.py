"""Kills and restarts of tokenize_corpus: the same bytes as without them, and nothing unfinished loads on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

from ted_scale.base import beneath, durable
from ted_scale.base.errors import UserError
from ted_scale.commands import tokenize_corpus, train_tokenizer
from ted_scale.corpora import output as staging
from ted_scale.corpora.local import expand, unfinished
from ted_scale.corpora.shards import read_index
from ted_scale.corpora.writer import finished_shards

TEXTS = ROOT / "ted_scale" / "corpora"  # one package: a kill at each step costs a reading of all of it
SHARD = ["--shard-tokens", "12000"]
OTHER = ["--shard-tokens", "18000"]


class Killed(BaseException):
    """Stands for kill -9 in a test of one process."""


@pytest.fixture(autouse=True)
def no_waits_for_the_disk(monkeypatch):
    """A kill loses nothing that was written; what a disk that fails loses is in tests/base/test_durable.py."""
    monkeypatch.setattr(durable.os, "fsync", durable.os.fstat)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, and text in two files with empty and unreadable documents between the good ones."""
    base = tmp_path_factory.mktemp("world")
    texts = [path.read_text() for path in sorted(TEXTS.glob("*.py"))]
    lines = [json.dumps({"text": text}) + "\n" for text in texts if text.strip()]
    (base / "text").mkdir()
    (base / "text" / "a.jsonl").write_text("".join(lines[::2]) + '{"text": " "}\n')
    (base / "text" / "b.jsonl").write_text('{"text": ""}\n{"text": 3}\n' + "".join(lines[1::2]))
    train_tokenizer.main(["--vocab-size", "600", "--out", str(base / "tok"), str(base / "text" / "a.jsonl")])
    return base


def arguments(world, out, *rest):
    tokenizer = str(world / "tok" / "tokenizer.model")
    inputs = [str(world / "text" / "a.jsonl"), str(world / "text" / "b.jsonl")]
    return ["--tokenizer", tokenizer, "--out", str(out), "--on-error", "skip", *SHARD, *map(str, rest), *inputs]


def run(world, out, *rest):
    tokenize_corpus.main(arguments(world, out, *rest))
    return published(out)


def published(out):
    """Every file of an output but hidden ones, by name."""
    return {path.name: path.read_bytes() for path in out.parent.iterdir() if not path.name.startswith(".")}


def loads(path):
    """The tokens that a training run would find, None where it is refused."""
    try:
        return sum(read_index(prefix).tokens for prefix in expand(path))
    except UserError:
        return None


@pytest.fixture(scope="module")
def whole(world):
    return run(world, world / "whole" / "c")


def manifest_of(files):
    return json.loads(files["c.manifest.json"])


def kill_at(monkeypatch, step):
    """The rename or unlink of this number is not done any more, and nothing is tidied up after it."""
    done = []

    def counting(act):
        def one(path, *rest, **options):
            if len(done) == step:
                raise Killed
            if path.exists():  # removing what is not there is no step
                done.append(path)
            return act(path, *rest, **options)

        return one

    for owner, name in ((Path, "rename"), (Path, "unlink"), (durable, "rename"), (beneath, "unlink")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    monkeypatch.setattr(staging, "leave", lambda out: None)
    return done


def steps_of_a_run(world, out, *rest):
    with pytest.MonkeyPatch.context() as monkeypatch:
        done = kill_at(monkeypatch, -1)
        run(world, out, *rest)
    return len(done)


def killed(world, out, step, *rest):
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            run(world, out, *rest)


def test_a_kill_at_any_rename_or_removal_resumes_to_the_same_bytes_and_never_loads_in_part(tmp_path, world, whole):
    steps = steps_of_a_run(world, tmp_path / "counted" / "c")
    tokens = manifest_of(whole)["tokens"]
    assert steps > 4 * len(manifest_of(whole)["shards"]) >= 20
    for step in range(steps):
        out = tmp_path / str(step) / "c"
        killed(world, out, step)
        assert loads(out) in (None, tokens) and loads(out.parent) in (None, tokens)
        assert run(world, out) == whole, step
        assert not unfinished(out).exists()


def test_a_kill_while_an_output_is_replaced_resumes_to_the_same_bytes(tmp_path, world, whole):
    run(world, tmp_path / "counted" / "c", *OTHER)
    for step in range(0, steps_of_a_run(world, tmp_path / "counted" / "c", "--overwrite"), 7):
        out = tmp_path / str(step) / "c"
        run(world, out, *OTHER)
        tokens = loads(out)
        killed(world, out, step, "--overwrite")
        assert loads(out) in (None, tokens)
        assert run(world, out, "--overwrite") == whole, step


def test_after_a_kill_while_another_command_s_output_is_cleared_either_command_resumes(tmp_path, world, whole):
    other = run(world, tmp_path / "other" / "c", *OTHER)
    for step in range(12):
        for rest, expected in (([], whole), ([*OTHER, "--overwrite"], other)):
            out = tmp_path / f"{step}{len(rest)}" / "c"
            killed(world, out, 4)
            killed(world, out, step, *OTHER, "--overwrite")
            if rest == [] and step > 9:  # the other command has finished shards by now
                continue
            assert run(world, out, *rest) == expected, step


def test_finished_shards_are_not_tokenized_again(tmp_path, world, whole, monkeypatch):
    killed(world, tmp_path / "c", 4)
    shards = finished_shards(unfinished(tmp_path / "c"))
    finished = sum(shard["documents"] for shard in shards)
    assert len(shards) == 3
    encoded, encode = [], tokenize_corpus._encode
    monkeypatch.setattr(tokenize_corpus, "_encode", lambda texts: (encoded.extend(texts), encode(texts))[1])
    assert run(world, tmp_path / "c") == whole
    assert len(encoded) == manifest_of(whole)["documents"] - finished


def test_another_number_of_workers_may_resume(tmp_path, world, whole):
    killed(world, tmp_path / "c", 4)
    assert run(world, tmp_path / "c", "--workers", 2) == whole


@pytest.mark.parametrize(
    ("rest", "named"),
    [
        (OTHER, "--shard-tokens"),
        (["--on-error", "stop"], "--on-error"),
        (["--document-per", "line"], "--document-per"),
        (["TOKENIZER"], "--tokenizer"),
        (["TOUCH"], "the input files"),
    ],
    ids=lambda value: str(value[0]).strip("-") if isinstance(value, list) else "",
)
def test_another_command_over_an_unfinished_output_is_refused_or_begins_anew(tmp_path, world, whole, rest, named):
    out, source = tmp_path / "c", world / "text" / "b.jsonl"
    killed(world, out, 4)
    stat = source.stat()
    if rest == ["TOKENIZER"]:
        rest = ["--tokenizer", world / "tok"]
    if rest == ["TOUCH"]:
        rest = []
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        with pytest.raises(UserError, match=f"must go on with the command that began it, but {named} changed since"):
            run(world, out, *rest)
        assert loads(out) is None and unfinished(out).exists()
        if named == "--shard-tokens":
            assert run(world, out, *rest, "--overwrite") == run(world, tmp_path / "again" / "c", *rest) != whole
    finally:
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_run_that_met_an_unreadable_document_goes_on_with_skip(tmp_path, world, whole, monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "BATCH_DOCUMENTS", 2)
    with pytest.raises(UserError, match=r"b\.jsonl:2 must be a JSON object"):
        run(world, tmp_path / "c", "--on-error", "stop")
    assert unfinished(tmp_path / "c").exists() and loads(tmp_path / "c") is None
    assert run(world, tmp_path / "c") == whole


def test_inputs_that_change_while_they_are_read_are_refused(tmp_path, world, monkeypatch):
    answers = iter([[{"path": "a", "bytes": 1, "modified_ns": 1}], [{"path": "a", "bytes": 1, "modified_ns": 2}]])
    monkeypatch.setattr(tokenize_corpus, "describe_sources", lambda files: next(answers))
    with pytest.raises(UserError, match="the input files must stay as they are while they are read"):
        run(world, tmp_path / "c")
    assert loads(tmp_path / "c") is None


def test_a_shard_is_bounded_by_default_and_a_small_output_has_one_without_number(tmp_path, world):
    assert tokenize_corpus.parse(["--tokenizer", "t", "--out", "o", "i"]).shard_tokens == tokenize_corpus.SHARD_TOKENS
    assert sorted(run(world, tmp_path / "c", "--shard-tokens", tokenize_corpus.SHARD_TOKENS)) == [
        "c.bin",
        "c.idx",
        "c.json",
        "c.manifest.json",
    ]


def test_the_manifest_has_the_totals_and_the_counts_of_skipped_documents(whole, world):
    manifest = manifest_of(whole)
    sidecars = [json.loads(whole[f"{shard['name']}.json"]) for shard in manifest["shards"]]
    assert [manifest[key] for key in ("documents", "tokens")] == [
        sum(sidecar[key] for sidecar in sidecars) for key in ("documents", "tokens")
    ]
    assert (manifest["empty"], manifest["skipped"], manifest["options"]["on_error"]) == (2, 1, "skip")
    assert [source["bytes"] for source in manifest["sources"]] == [
        (world / "text" / name).stat().st_size for name in ("a.jsonl", "b.jsonl")
    ]
    assert {sidecar["tokenizer_digest"] for sidecar in sidecars} == {manifest["tokenizer_digest"]}
    assert all(sidecar["tokens"] <= int(SHARD[1]) or sidecar["documents"] == 1 for sidecar in sidecars)


def kill_at_random(world, out, kills):
    """Runs that SIGKILL ends, each some shards (0 to 3) after its start and at a random moment of the next one; the number of
    shards that they finished."""
    moments, folder, standing = random.Random(kills), unfinished(out), 0
    command = [sys.executable, str(ROOT / "tools/tokenize_corpus.py"), *large_arguments(world, out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = standing + moments.randint(0, 3)
        while len(list(folder.glob("*.json.part"))) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before it was killed; give it more text"
        assert loads(out) is None and loads(out.parent) is None
        standing = len(finished_shards(folder))
    return standing


def large_arguments(world, out):
    return [*arguments(world, out, "--workers", "2", "--shard-tokens", "100000")[:-2], str(world / "large.jsonl")]


@pytest.mark.parametrize(("kills", "copies"), [(3, 60), pytest.param(10, 200, marks=pytest.mark.soak)])
def test_kills_at_random_moments_leave_the_same_bytes(tmp_path, world, kills, copies):
    text = "".join((world / "text" / name).read_text() for name in ("a.jsonl", "b.jsonl"))
    (world / "large.jsonl").write_text(text * copies)
    tokenize_corpus.main(large_arguments(world, tmp_path / "whole" / "c"))
    whole = published(tmp_path / "whole" / "c")
    out = tmp_path / "killed" / "c"
    assert kill_at_random(world, out, kills) >= kills, "kills came before there was work"
    tokenize_corpus.main(large_arguments(world, out))
    assert published(out) == whole


@pytest.mark.parametrize("place", ["a.jsonl/out", "/proc/nowhere/out"])
def test_an_output_that_cannot_be_written_is_reported_in_one_sentence(world, place):
    with pytest.raises(UserError, match=r"--out must be where files can be written, but .* is not"):
        run(world, world / "text" / place)


def test_a_damaged_job_file_is_refused(tmp_path, world):
    folder = unfinished(tmp_path / "out")
    folder.mkdir()
    (folder / "job.json").write_text("{")
    with pytest.raises(UserError, match=r"job.json must say what was begun, but is damaged; pass --overwrite"):
        run(world, tmp_path / "out")
    assert run(world, tmp_path / "out", "--overwrite")
