"""How a process exits: with the ranks that watch each other, or alone."""

import sys
import threading

import pytest

from ted_scale.base import exits
from ted_scale.base.errors import FAULT


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(exits.redact, "watch_logs", lambda: None)


class Left(BaseException):
    """In place of the end of the process."""


def test_a_traceback_of_a_run_on_one_rank_goes_to_its_log_and_its_last_words_like_any_other(monkeypatch):
    """Otherwise the next start says that it was killed."""
    said = []
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(exits, "end_together", lambda words, code: said.append((words, code)))
    monkeypatch.setattr(exits, "leave", lambda code: (_ for _ in ()).throw(Left(code)))

    def main():
        raise KeyError("a fault")

    with pytest.raises(Left):
        exits.run_main(main)
    ((words, code),) = said
    assert "KeyError: 'a fault'" in words and code == FAULT


def test_a_tool_s_traceback_is_python_s_own(monkeypatch):
    monkeypatch.setattr(exits, "end_together", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ZeroDivisionError):
        exits.run_main(lambda: 1 / 0)
