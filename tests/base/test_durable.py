"""durable.py: a file or folder is whole or as it was before, and no descriptor is left when the disk fails."""

import os
from pathlib import Path

import pytest

from ted_scale.base import durable


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def failing(*_):
    raise OSError(5, "the disk fails")


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_write_that_fails_leaves_the_old_file_and_no_descriptor(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    durable.write_durably(path, "before")
    opened = descriptors()
    with monkeypatch.context() as broken, pytest.raises(OSError, match="the disk fails"):
        broken.setattr(os, call, failing)
        durable.write_durably(path, [b"af", b"ter"])
    assert path.read_text() == "before" and descriptors() == opened
    durable.write_durably(path, [b"af", b"ter"])
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_sync_that_fails_leaves_no_descriptor(tmp_path, monkeypatch):
    opened = descriptors()
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="the disk fails"):
        durable.sync(tmp_path)
    assert descriptors() == opened


def test_a_folder_that_could_not_be_renamed_is_put_back(tmp_path, monkeypatch):
    old, part = tmp_path / "a", tmp_path / "a.part"
    for folder, text in ((old, "old"), (part, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    rename = os.rename
    with monkeypatch.context() as broken, pytest.raises(OSError, match="the disk fails"):
        broken.setattr(os, "rename", lambda name, to, **at: failing() if name == part.name else rename(name, to, **at))
        durable.publish(part)
    assert not old.exists()
    durable.put_back(tmp_path)
    assert (old / "file").read_text() == "old"
    durable.publish(part)
    assert (old / "file").read_text() == "new" and list(tmp_path.iterdir()) == [old]


def test_a_folder_that_somebody_removed_before_its_rename_is_not_published(tmp_path):
    with pytest.raises(FileNotFoundError, match="somebody has removed it"):
        durable.publish(tmp_path / "step.part")
