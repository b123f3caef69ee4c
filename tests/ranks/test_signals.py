"""Processes that cannot be read: other users', under hidepid, and all of them for a moment without free descriptors."""

import errno
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest

from ted_scale.base import exits
from ted_scale.ranks import pulse, signals


class Unreadable(psutil.Process):
    """Of another user."""

    def fail(self, *_):
        raise psutil.AccessDenied(self.pid)

    parent = ppid = cmdline = status = fail


def launcher(ppid=lambda: 1, pid: int | None = None):
    return SimpleNamespace(pid=os.getppid() if pid is None else pid, ppid=ppid)


def raising(error):
    def ppid():
        raise error

    return ppid


@pytest.mark.parametrize(
    ("launchers", "gone"),
    [
        ((), False),
        ((launcher(),), False),
        ((launcher(pid=1 << 22),), True),
        ((launcher(), launcher(pid=1 << 22)), True),
        ((launcher(raising(psutil.NoSuchProcess(1))),), True),
        ((launcher(raising(psutil.AccessDenied(1))),), False),
        ((launcher(raising(OSError(errno.EMFILE, "Too many open files"))),), False),
    ],
    ids=["none", "there", "another parent", "its own parent is another", "ended", "not readable", "no descriptors"],
)
def test_a_launcher_that_cannot_be_read_now_is_not_gone(monkeypatch, launchers, gone):
    monkeypatch.setattr(signals, "launchers", launchers)
    assert signals.launcher_is_gone() is gone


def test_a_run_starts_below_a_process_that_cannot_be_read():
    unreadable = Unreadable(os.getpid())
    assert signals.parent_of(unreadable) is None and signals.words_of(unreadable) == []


def test_descendants_are_found_beside_processes_that_cannot_be_read(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = [Unreadable(os.getppid()), *psutil.process_iter()]
    monkeypatch.setattr(psutil, "process_iter", lambda: seen)
    assert child.pid in [process.pid for process in signals.descendants_of(os.getpid())]
    child.communicate(b"\n")


@pytest.mark.parametrize(("unsaved", "said"), [(True, signals.IN_TIME), (False, signals.AT_ONCE)])
def test_ctrl_c_promises_a_save_only_where_something_is_unsaved(monkeypatch, capsys, unsaved, said):
    monkeypatch.setattr(signals, "asked", threading.Event())
    monkeypatch.setattr(signals.watched, "is_set", lambda: True)
    monkeypatch.setattr(exits, "where_it_stands", lambda begins: begins)
    monkeypatch.setattr(pulse, "now", pulse.now._replace(unsaved=unsaved))
    readable, writable = os.pipe()
    os.write(writable, bytes([signal.SIGINT]))
    os.close(writable)
    signals.read_signals(readable)
    assert said in capsys.readouterr().err
