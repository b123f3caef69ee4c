"""The report of a run that is still training: a thread of rank 0 starts a process that writes it, and waits for the process.

So no step waits for the report, and its memory and errors stay in that process. Note: the process is started by its module's
name, because that module is on a higher floor and cannot be imported here. It has the lowest priority, so it uses only time that
the ranks leave.
"""

import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from ted_scale.base.errors import clean, shortened
from ted_scale.base.packages import install_extra
from ted_scale.metrics.console import log_line
from ted_scale.ranks import signals

NAME = "report.html"
LONGEST_S, LAST_S = 300, 60  # for a page during the run, and for the last page
# The process must not inherit these variables, or it would act as a rank.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LiveReport:
    """Writes the folder's report.html at a fixed interval of minutes."""

    def __init__(self, folder: Path, every_minutes: float):
        self.page, self.command, self.every_s = folder / NAME, command(folder), 60 * every_minutes
        self.ending, self.complained = threading.Event(), False
        self.process: subprocess.Popen | None = None
        self.starting = threading.Lock()
        self.thread = threading.Thread(target=self.work, daemon=True, name="report")
        self.thread.start()

    def work(self) -> None:
        while not self.ending.wait(self.every_s):
            self.write(LONGEST_S)

    def write(self, longest_s: float, *, last: bool = False) -> bool:
        """Write the page. Returns whether it was written. An error is logged once, and the run goes on."""
        try:
            process = self.begun(last)
            code, words = finished(process, longest_s) if process else (1, "the run ends")
        except OSError as error:  # no memory, or too many processes
            code, words = 1, str(error)
        if code and not self.complained and not self.ending.is_set():
            self.complained = True
            log_line(f"{self.page} must be written, but is not ({words}); the run goes on without it")
        return not code

    def begun(self, last: bool) -> subprocess.Popen | None:
        """Start a process. When the run ends, the thread starts none: it would write the same file as the last page."""
        with self.starting:
            if self.ending.is_set() and not last:
                return None
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment(),
            )
            return self.process

    def close(self, *, done: bool = True) -> Path | None:
        """Write the last page and return it. A run that failed or was asked to stop writes none: a launcher kills it soon, and
        what comes after this matters more. The next start writes it."""
        self.ending.set()
        with self.starting:  # wait until the thread has started its process
            if self.process and self.process.poll() is None:
                self.process.kill()  # its page would have old numbers
        self.thread.join(5)
        if signals.asked.is_set() or not done:
            return None
        return self.page if self.write(LAST_S, last=True) else None


def why_never(every_minutes: float) -> str | None:
    """A warning if a report is asked for but cannot be drawn. A run does not fail because of its report."""
    if not every_minutes or find_spec("bokeh"):
        return None
    asked = f"report.every_minutes = {every_minutes:g}"
    return f"warning: {asked} writes no page, because Bokeh is not installed: {install_extra('report')}"


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "ted_scale.commands.report", str(folder), "--out", str(folder / NAME), "--background"]


def environment() -> dict[str, str]:
    """The environment of the process. This project's root comes first in PYTHONPATH, because the run may have been started from a
    checkout that is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    return {**{name: value for name, value in os.environ.items() if name not in RANKS}, "PYTHONPATH": path}


def finished(process: subprocess.Popen, longest_s: float) -> tuple[int, str]:
    """(exit code, last line of its errors)"""
    try:
        _, said = process.communicate(timeout=longest_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return 1, f"it took longer than {longest_s:.0f} s"
    lines = said.decode(errors="replace").strip().splitlines() or [""]
    return process.returncode, shortened(clean(lines[-1]), 300)
