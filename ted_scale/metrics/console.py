"""The log: log.txt and the console on rank 0, warnings of every rank, and lines that do not tear the progress bar."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from ted_scale.base import redact

log = logging.getLogger("ted_scale")


def say(line: str) -> None:
    """A line of the log that does not tear the progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        log.info(line)


def open_log(folder: Path, writes: bool) -> None:
    """log.txt and the console on rank 0; warnings of every rank."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if writes:
        handlers.append(logging.FileHandler(folder / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    redact.watch_logs()
    log.handlers, log.propagate = handlers, False
    log.setLevel(logging.INFO if writes else logging.WARNING)
