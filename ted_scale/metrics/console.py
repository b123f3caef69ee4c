"""The log: log.txt and the console on rank 0, and the warnings of every rank."""

import logging
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ted_scale.base import redact
from ted_scale.base.beneath import append_to
from ted_scale.base.errors import files_at

log = logging.getLogger("ted_scale")
level = logging.INFO  # of the console; log.txt has all levels


def log_line(line: str, importance: int = logging.INFO) -> None:
    """Log a line above the progress bar, so that the line and the bar do not mix."""
    with tqdm.external_write_mode(file=sys.stderr):
        log.log(importance, line)


def say_early(line: str) -> None:
    """Before there is a log: on rank 0's console, as a line of it."""
    if level <= logging.INFO and os.environ.get("RANK", "0") == "0":
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def choose_level(name: str) -> None:
    """Set what the console shows from here on (`--log-level`). Import warnings of libraries are hidden, because a user can change
    nothing about them. The device of a run, which some of them report, is also in our log."""
    global level
    level = logging.getLevelNamesMapping()[name.upper()]
    for library in ("DeepSpeed", "torchao"):
        logging.getLogger(library).addFilter(lambda record: record.levelno >= logging.ERROR)


class LogFile(logging.FileHandler):
    """log.txt. If the disk is full or fails, lines are lost here, but the console has them."""

    def _open(self):
        return append_to(Path(self.baseFilename))

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)  # a bug: its traceback


def open_log(folder: Path, writes: bool) -> None:
    """Rank 0 logs to log.txt and to the console. The other ranks log only warnings, to the console."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(level)
    if writes:
        with files_at(folder):
            handlers.append(LogFile(folder / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    redact.watch_logs()
    log.handlers, log.propagate = handlers, False
    log.setLevel(logging.INFO if writes else logging.WARNING)
