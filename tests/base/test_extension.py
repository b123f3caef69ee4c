"""The lock of DeepSpeed's operation for CPU ranks: who waits for it, and when it is removed."""

import logging
import os
import threading
import time

import pytest

from ted_scale.base import extension


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / extension.NAME
    folder.mkdir()
    (folder / "lock").touch()
    return folder / "lock"


def test_the_lock_that_a_killed_process_left_is_removed_and_logged(lock, caplog):
    """Every later start waited for it, without a word, until limits.start_s was over."""
    os.utime(lock, (time.time() - 2 * extension.COMPILES_S,) * 2)
    with caplog.at_level(logging.WARNING, "ted_scale"):
        extension.wait_for_lock()
    assert not lock.exists()
    assert f"{lock} was removed: it was 20 minutes old" in caplog.text


def test_a_start_waits_for_a_process_that_compiles_and_says_so_once(lock, caplog, monkeypatch):
    monkeypatch.setattr(extension, "TOLD_S", 0.1)
    threading.Timer(0.7, lock.unlink).start()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "ted_scale"):
        extension.wait_for_lock()
    assert time.monotonic() - began > 0.5
    assert caplog.text.count(f"the start waits for {lock}") == 1


def test_the_folders_are_those_in_which_torch_compiles(tmp_path, monkeypatch):
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert extension.folders() == []
    made = _get_build_directory(extension.NAME, verbose=False)
    assert [str(folder) for folder in extension.folders()] == [made]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "own"))
    made = _get_build_directory(extension.NAME, verbose=False)
    assert [str(folder) for folder in extension.folders()] == [made]


def test_only_the_first_rank_of_a_node_removes_a_lock(lock, monkeypatch):
    """Two that remove it might remove the lock of the one that was faster, and compiles."""
    os.utime(lock, (time.time() - 2 * extension.COMPILES_S,) * 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    waits = threading.Thread(target=extension.wait_for_lock)
    waits.start()
    waits.join(0.5)
    assert waits.is_alive() and lock.exists()
    lock.unlink()
    waits.join(5)
    assert not waits.is_alive()
