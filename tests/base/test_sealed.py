"""A checkpoint is whole or passed over, and which of the whole ones stay. What 200 damages do: test_saver.py, on what the
trainer writes."""

import errno
import json
import os
import random
import shutil
import stat
from pathlib import Path

import pytest
from damages import flip

from ted_scale.base import durable, patience, sealed
from ted_scale.base.errors import Gone, UserError
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import PROGRESS, Progress, progress_as_bytes
from ted_scale.config.operation import Checkpoint


def leave(run: Path, step: int, validation: float | None = None, forks: tuple[int, ...] = ()) -> Path:
    """A published checkpoint of a few small files."""
    rng = random.Random(step)
    part = files.checkpoints_of(run) / (files.checkpoint_name(step, len(forks)) + durable.PART)
    part.mkdir(parents=True)
    progress = progress_as_bytes(Progress(step, step * 256, step * 8))
    entries = {PROGRESS: durable.write_file(part / PROGRESS, [progress])}
    for rank in range(2):
        name = f"rank_{rank:05d}.safetensors"
        entries[name] = durable.write_file(part / name, [rng.randbytes(300), b"", rng.randbytes(77)])
    sealed.seal(part, entries, {"step": step, "forks": forks, "ranks": 2, "validation": validation})
    return durable.publish(part)


def newest_whole(run: Path) -> Path | None:
    """As a resume finds it: sizes and manifests first, then every byte."""
    return next((s.path for s in files.published(run) if not (s.fault or files.check_digests(s.path))), None)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for step in (4, 8, 12):
        leave(run, step)
    return run


@pytest.mark.parametrize("pointer", [None, "step_00000099", "", "../../etc"])
def test_the_newest_checkpoint_is_found_without_a_pointer_file(original, tmp_path, pointer):
    run = shutil.copytree(original, tmp_path / "run")
    if pointer is not None:
        (files.checkpoints_of(run) / "latest").write_text(pointer)
    assert newest_whole(run).name == "step_00000012"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "", "a/b"])
def test_a_manifest_names_files_of_its_own_folder_only(original, tmp_path, name):
    run = shutil.copytree(original, tmp_path / "run")
    path = files.checkpoints_of(run) / "step_00000012" / sealed.MANIFEST
    content = json.loads(path.read_text())["content"]
    content["files"][name] = [1, "0"]
    path.write_text(json.dumps({"content": content, "sha256": sealed.digest_of_content(content)}))
    with pytest.raises(sealed.Damaged, match=r"which is no file in it|must name files of its own folder"):
        sealed.read_manifest(path.parent)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_in_one_sentence(original, tmp_path):
    run = shutil.copytree(original, tmp_path / "run")
    for checkpoint in files.checkpoints_of(run).iterdir():
        (checkpoint / sealed.MANIFEST).unlink()
    with pytest.raises(UserError, match="must hold a whole checkpoint, but none of 3 is") as caught:
        files.newest_checkpoint(run)
    assert "\n" not in str(caught.value)


def test_pruning_keeps_the_last_the_periodic_and_the_best_checkpoints(tmp_path):
    for step, loss in ((2, 5.0), (4, 3.0), (6, None), (8, 4.0), (10, 3.5), (12, 3.1), (14, 9.0)):
        leave(tmp_path, step, loss)
    (files.checkpoints_of(tmp_path) / "step_00000008" / sealed.MANIFEST).unlink()
    files.prune(tmp_path, Checkpoint(keep=2, keep_every=6, keep_best=True))
    left = sorted(p.name for p in files.checkpoints_of(tmp_path).iterdir())
    assert left == [files.checkpoint_name(step) for step in (4, 6, 8, 12, 14)]  # 8 is damaged: not ours to remove


def test_after_a_rewind_the_new_line_is_kept_and_resumed_from(tmp_path):
    """From 8 back to 6, and on with 7: the newest is 7, its history 6 and 4, and 8 belongs to nobody."""
    for step in (2, 4, 6, 8):
        leave(tmp_path, step, 1.0 / step)
    leave(tmp_path, 7, 0.9, forks=(6,))
    assert [s.path.name[5:] for s in files.published(tmp_path)][:2] == ["00000007_1", "00000008"]
    assert newest_whole(tmp_path).name == "step_00000007_1"
    whole = {s.path.name: s.manifest for s in files.published(tmp_path)}
    assert [files.key_of(name) for name in files.history(whole)] == [(1, 7), (0, 6), (0, 4), (0, 2)]
    files.prune(tmp_path, Checkpoint(keep=2, keep_every=4, keep_best=True))
    assert sorted(p.name[5:] for p in files.checkpoints_of(tmp_path).iterdir()) == [
        "00000004",
        "00000006",
        "00000007_1",
    ]
    leave(tmp_path, 8, None, forks=(6, 4))
    whole = {s.path.name: s.manifest for s in files.published(tmp_path)}
    assert [files.key_of(name) for name in files.history(whole)] == [(2, 8), (0, 4)]


@pytest.mark.parametrize(
    "name", ["step_²", "step_0000000²", "step_4", "step_00000004_0", "step_00000004.part", "step_00000004_x"]
)
def test_a_folder_with_another_name_is_no_checkpoint(name):
    assert files.key_of(name) is None


def test_publishing_replaces_a_damaged_checkpoint_of_the_same_step(original, tmp_path):
    run = shutil.copytree(original, tmp_path / "run")
    (files.checkpoints_of(run) / "step_00000012" / PROGRESS).unlink()
    leave(run, 12)
    assert newest_whole(run).name == "step_00000012"
    assert not list(files.checkpoints_of(run).glob(f"*{durable.PART}"))


def test_the_tool_lists_verifies_and_prunes(original, tmp_path, capsys):
    from ted_scale.commands.checkpoints import main

    run = shutil.copytree(original, tmp_path / "run")
    rank_1 = files.checkpoints_of(run) / "step_00000008" / "rank_00001.safetensors"
    flip(rank_1, random.Random(0))
    (files.checkpoints_of(run) / "step_00000016.part").mkdir()
    main([str(run), "list"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [*(f"step_{s:08d}" for s in (12, 8, 4)), "step_00000016.part"]
    assert all(line.endswith("whole") for line in said[:3])
    with pytest.raises(SystemExit) as code:
        main([str(run), "verify"])
    said = capsys.readouterr().out.splitlines()
    assert code.value.code == 1
    assert said[1].endswith("DAMAGED: rank_00001.safetensors is not as it was written")
    main([str(run), "prune", "--keep", "2"])
    assert "nothing was removed" in capsys.readouterr().out
    main([str(run), "prune", "--keep", "2", "--yes"])
    assert sorted(p.name for p in files.checkpoints_of(run).iterdir()) == ["step_00000004", "step_00000012"]


def test_the_tool_continues_when_a_running_run_removes_a_checkpoint(original, tmp_path, capsys, monkeypatch):
    from ted_scale.commands.checkpoints import main

    run = shutil.copytree(original, tmp_path / "run")
    check = files.check_digests

    def check_and_lose(checkpoint):
        if checkpoint.name == "step_00000008":
            shutil.rmtree(checkpoint)
        return check(checkpoint)

    monkeypatch.setattr(files, "check_digests", check_and_lose)
    main([str(run), "verify"])
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "step_00000008  removed meanwhile" and said[2].endswith("whole")


@pytest.mark.parametrize(
    "forged",
    [
        {"forks": "abc"},
        {"forks": [None]},
        {"forks": [3]},
        {"validation": "x"},
        {"step": 13},
        {"scores": {"val/ppl": "x"}},
    ],
)
def test_a_manifest_of_another_folder_is_damage_although_its_digest_is_right(original, tmp_path, forged):
    run = shutil.copytree(original, tmp_path / "run")
    path = files.checkpoints_of(run) / "step_00000012" / sealed.MANIFEST
    content = {**json.loads(path.read_text())["content"], **forged}
    path.write_text(json.dumps({"content": content, "sha256": sealed.digest_of_content(content)}))
    assert files.published(run)[0].fault == "its manifest.json is not of step_00000012"
    assert newest_whole(run).name == "step_00000008"


# What a file server says for a while is no damage

PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EACCES, errno.ENOTCONN, errno.ENOENT)


def answering(monkeypatch, name: str, code: int, times: float):
    """The calls of `os.NAME` for files of the newest checkpoint fail that often."""
    original, left = getattr(os, name), [times]

    def call(path, *arguments, **named):
        if left[0] > 0 and "step_00000012/" in str(path):
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return original(path, *arguments, **named)

    monkeypatch.setattr(os, name, call)


@pytest.fixture
def hasty(monkeypatch):
    for name, value in {"PATIENCE_S": 0.2, "MISSING_S": 0.1, "FIRST_PAUSE_S": 0.001, "LONGEST_PAUSE_S": 0.01}.items():
        monkeypatch.setattr(patience, name, value)


@pytest.mark.parametrize("call", ["open", "lstat"])
@pytest.mark.parametrize("code", PASSING, ids=errno.errorcode.get)
def test_an_error_that_passes_is_no_damage(original, hasty, monkeypatch, code, call):
    answering(monkeypatch, call, code, 3)
    newest = files.listed(original)[0]
    assert files.look_at(newest).fault is None and files.check_digests(newest) is None


@pytest.mark.parametrize("code", PASSING[:-1], ids=errno.errorcode.get)
def test_an_error_that_stays_is_gone_and_never_damage_and_nothing_older_is_used_or_removed(
    original, tmp_path, hasty, monkeypatch, code
):
    run = shutil.copytree(original, tmp_path / "run")
    answering(monkeypatch, "open", code, float("inf"))

    for look in (files.newest_checkpoint, files.published, lambda run: files.prune(run, Checkpoint(keep=1))):
        with pytest.raises(
            Gone, match=rf"step_00000012/manifest.json must be readable.*{os.strerror(code)}.*move them"
        ):
            look(run)
    assert len(files.listed(run)) == 3


def test_a_listing_that_fails_is_asked_for_again_and_is_not_an_empty_one(original, hasty, monkeypatch):
    scandir, left = os.listdir, [2]

    def listdir(path):
        left[0] -= 1
        if left[0] >= 0 and str(path).endswith("checkpoints"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return scandir(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert len(files.listed(original)) == 3
    left[0] = 10**6
    with pytest.raises(Gone, match="checkpoints must be readable, but was not for"):
        files.listed(original)


def test_the_tool_calls_what_cannot_be_read_by_its_name_and_prunes_nothing(
    original, tmp_path, hasty, monkeypatch, capsys
):
    from ted_scale.commands.checkpoints import main

    run, digest = shutil.copytree(original, tmp_path / "run"), sealed.digest_of

    def bad_block(path):
        if "step_00000008/rank_00001" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return digest(path)

    monkeypatch.setattr(sealed, "digest_of", bad_block)
    with pytest.raises(SystemExit):
        main([str(run), "verify"])
    said = capsys.readouterr().out.splitlines()
    assert [line.rstrip().endswith("whole") for line in said] == [True, False, True]
    assert "cannot be read: " in said[1] and "DAMAGED" not in said[1] and "rank_00001.safetensors" in said[1]
    with pytest.raises(Gone, match="Input/output error"):
        main([str(run), "prune", "--keep", "1", "--yes"])
    assert len(files.listed(run)) == 3


def test_a_start_looks_at_no_checkpoint_behind_the_newest_whole_one(original, monkeypatch):
    seen, look = [], files.look_at
    monkeypatch.setattr(files, "look_at", lambda path, *check: seen.append(path.name) or look(path, *check))
    assert files.newest_checkpoint(original).name == "step_00000012" and seen == ["step_00000012"]


@pytest.mark.parametrize("name", [sealed.MANIFEST, PROGRESS])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "socket"])
def test_what_is_no_plain_file_is_damage_and_is_not_opened(original, tmp_path, name, kind):
    """Without a wait: the open of a pipe would not return."""
    run = shutil.copytree(original, tmp_path / "run")
    path = files.checkpoints_of(run) / "step_00000012" / name
    path.rename(tmp_path / "true")
    make = {
        "pipe": os.mkfifo, "folder": Path.mkdir, "link": lambda path: path.symlink_to(tmp_path / "true"),
        "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    }  # fmt: skip
    make[kind](path)
    assert files.published(run)[0].fault == f"{name} is a {kind}"
    assert newest_whole(run).name == "step_00000008"
