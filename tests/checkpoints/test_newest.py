"""Where a run resumes is found with few questions to a file server."""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest
from test_saver import Run, one_rank, saver_of, write  # noqa: F401 - a fixture of this module, too

from ted_scale.base import patience, sealed
from ted_scale.base.errors import Gone, UserError
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import resume
from ted_scale.checkpoints.progress import PROGRESS
from ted_scale.checkpoints.resume import newest_progress


def test_at_a_start_only_rank_0_asks_for_sizes_and_only_of_the_newest_whole_checkpoint(tmp_path, monkeypatch):
    """1,024 ranks asked for 1,024 sizes each, all at once."""
    (tmp_path / "filters").write_bytes(b"filters")
    run, size_of, asked = Run(tmp_path / "run", keep=3), sealed.size_of, []
    saver = saver_of(run, tmp_path / "filters")
    for step in (1000, 2000, 3000):
        assert write(saver, step) is None
    monkeypatch.setattr(sealed, "size_of", lambda path: asked.append((path.parent.name, path.name)) or size_of(path))
    for rank, names in ((0, {PROGRESS, files.FILTERS, "rank_00000.safetensors"}), (1, {PROGRESS})):
        asked.clear()
        monkeypatch.setenv("RANK", str(rank))
        assert newest_progress(run)[1].step == 3000
        assert sorted(asked) == sorted(("step_00003000", name) for name in names)
    (files.checkpoints_of(run.folder) / "step_00003000" / PROGRESS).unlink()
    assert newest_progress(run)[1].step == 2000


@pytest.mark.parametrize("call", ["stat", "access"])
def test_a_folder_that_fails_once_is_looked_at_again(tmp_path, monkeypatch, call):
    """One stale handle was a mistake of the user, after which no supervisor starts again."""
    run = Run(tmp_path / "run", keep=3)
    run.folder.mkdir()
    struck, original = [], getattr(os, call)

    def once(path, *arguments, **named):
        if not struck and Path(path) == run.folder:
            struck.append(path)
            if call == "access":
                return False
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return original(path, *arguments, **named)

    monkeypatch.setattr(os, call, once)
    assert resume.nearest_writable(run.folder) == run.folder
    assert struck


def test_a_folder_that_stays_out_of_reach_is_gone_and_one_without_rights_a_mistake(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^runs must be a folder this user can write, but .*file is not; set runs or"):
        resume.nearest_writable(tmp_path / "file")
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    monkeypatch.setattr(resume, "nearest", stale)
    with pytest.raises(Gone, match=r"run must be readable, but was not for 0.2 s"):
        resume.nearest_writable(tmp_path / "run")


def stale(path):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


@pytest.mark.parametrize("where", ["", "checkpoints", "metrics.jsonl"])
def test_what_a_run_writes_to_is_tried_and_nothing_is_left(tmp_path, where):
    """Root may write whatever a mode says, but not what is immutable: the dry run took it for good."""
    run = Run(tmp_path / "run", keep=3)
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("{}\n")
    before = {path: path.stat().st_mtime_ns for path in (run.folder, *run.folder.rglob("*"))}
    resume.find(run, {})
    with (
        immutable(run.folder / where),
        pytest.raises(UserError, match=rf"^runs must .* but {run.folder / where} is not"),
    ):
        resume.find(run, {})
    assert {path: path.stat().st_mtime_ns for path in (run.folder, *run.folder.rglob("*"))} == before


@contextlib.contextmanager
def immutable(path: Path):
    """For root, too."""
    mode = path.stat().st_mode
    of_root = os.geteuid() == 0
    if of_root and subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable files")
    if not of_root:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        yield
    finally:
        if of_root:
            subprocess.run(["chattr", "-i", path], check=True)
        else:
            path.chmod(mode)
