"""Kills and restarts over conversations: the same bytes, with other workers and with lines that are left out."""

import json
from pathlib import Path

import chats
import pytest

from ted_scale.base import beneath, durable
from ted_scale.base.errors import UserError
from ted_scale.commands import tokenize_corpus
from ted_scale.corpora import output as staging
from ted_scale.corpora.local import unfinished


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    base = tmp_path_factory.mktemp("world")
    chats.make_tokenizer(base / "tok")
    good = chats.conversations(240)
    bad = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [json.dumps(record) for n, record in enumerate(good) for record in ([bad] * (n % 7 == 0) + [record])]
    lines[5:5] = ["", "{"]
    (base / "a.jsonl").write_text("\n".join(lines[:150]) + "\n")
    (base / "b.jsonl").write_text("\n".join(lines[150:]) + "\n")
    return base


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "BATCH_DOCUMENTS", 16)


def run(world, out, *rest):
    options = ["--tokenizer", world / "tok", "--out", out, "--targets", "assistant", "--on-error", "skip"]
    inputs = [world / "a.jsonl", world / "b.jsonl"]
    tokenize_corpus.main([*map(str, options), "--shard-tokens", "2000", *rest, *map(str, inputs)])
    return {path.name: path.read_bytes() for path in out.parent.iterdir() if not path.name.startswith(".")}


def killed(world, out, step):
    """The rename or removal of this number is not done any more."""
    done = []

    def counting(act):
        def one(path, *rest, **options):
            if len(done) == step:
                raise Killed
            done.append(path)
            return act(path, *rest, **options)

        return one

    with pytest.MonkeyPatch.context() as monkeypatch:
        for owner, name in ((Path, "rename"), (durable, "rename"), (beneath, "unlink")):
            monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
        monkeypatch.setattr(staging, "leave", lambda out: None)
        with pytest.raises(Killed):
            run(world, out)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path, world):
    whole = run(world, tmp_path / "whole" / "c")
    manifest = json.loads(whole["c.manifest.json"])
    assert len(manifest["shards"]) > 4 and manifest["skipped"] == 36
    for step in range(2, 24, 3):
        out = tmp_path / str(step) / "c"
        killed(world, out, step)
        assert run(world, out, "--workers", "1") == whole, step
    out = tmp_path / "workers" / "c"
    killed(world, out, 9)
    assert run(world, out, "--workers", "2") == whole


def test_another_template_or_other_targets_do_not_continue_an_output(tmp_path, world):
    out = tmp_path / "c"
    killed(world, out, 9)
    (tmp_path / "marked.jinja").write_text(chats.MARKED)
    with pytest.raises(UserError, match="--chat-template changed since"):
        run(world, out, "--chat-template", str(tmp_path / "marked.jinja"))
    with pytest.raises(UserError, match="--targets changed since"):
        run(world, out, "--targets", "last")
    assert unfinished(out).exists()
