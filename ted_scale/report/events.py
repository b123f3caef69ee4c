"""What happened to a run, on its time line: starts, restarts, changes, rewinds, alerts, checkpoints, the end.

The log is the only record of most of them. Its sentences are known here by a few words each; tests/report makes the lines with the
functions that log them. Note: only rows of metrics know a step by themselves, so an event without one has that of the line before.
"""

import re
from pathlib import Path
from typing import NamedTuple

from ted_scale.checkpoints import folder as files

KINDS = (
    "start",
    "restart",
    "change",
    "rewind",
    "alert",
    "checkpoint",
    "end",
)  # from the bottom of the time line to its top
CLOCK = re.compile(r"^(\d\d:\d\d:\d\d) (.*)$")
NUMBER = r"(\d{1,15})(?!\d)"  # of a step; a longer one is none
STEP = re.compile(rf"^step +{NUMBER}(:| )")
FOUND = (  # the first that fits decides
    ("start", re.compile(rf"^starts at step {NUMBER} of ")),
    ("restart", re.compile(rf"^resuming from .*?step_{NUMBER}")),
    ("restart", re.compile(r"^the run was down for ")),
    ("change", re.compile(rf" instead of .* from step {NUMBER} on$")),
    ("rewind", re.compile(rf"; back to step_{NUMBER}\S* and on with ")),
    ("alert", re.compile(rf"^step {NUMBER}: ")),
    ("alert", re.compile(r"has no copy; the run goes on|rows are lost until|W&B is (offline|lost|behind)|is damaged")),
    ("end", re.compile(rf"^done: .* is at step {NUMBER}")),
)  # fmt: skip
SHOWN = 2_000  # events that a page has room for


class Event(NamedTuple):
    step: int
    kind: str
    text: str
    clock: str = ""  # of the day, where the log has it


def events_of(folder: Path, log: str, series: dict) -> list[Event]:
    """By step, and at the same step in the order in which they happened."""
    found = [*events_in(log.splitlines()), *checkpoints_in(series), *kept(folder, series)]
    return sorted(found, key=lambda event: event.step)


def events_in(lines: list[str]) -> list[Event]:
    found, step = [], 0
    for line in lines:
        clock, text = timed.groups() if (timed := CLOCK.match(line)) else ("", line)
        if number := STEP.match(text):
            step = int(number[1])
        for kind, pattern in FOUND:
            if match := pattern.search(text):
                at = [group for group in match.groups() if group and group.isdigit()]
                step = int(at[0]) if at and kind != "alert" else step
                found.append(Event(step, kind, text, clock))
                break
    return found


def checkpoints_in(series: dict) -> list[Event]:
    """Those that were written, by their rows."""
    writes = series.get("checkpoint/write_ms")
    rows = zip(writes.steps, writes.values, strict=True) if writes else ()
    return [Event(int(step), "checkpoint", f"written in {value / 1e3:.3g} s") for step, value in rows]


def kept(folder: Path, series: dict) -> list[Event]:
    """Those on disk that no row speaks of: the last one of a run that was stopped, or of an earlier version."""
    try:
        names = [path.name for path in files.checkpoints_of(folder).iterdir() if files.key_of(path.name)]
    except OSError:
        return []
    writes = series.get("checkpoint/write_ms")
    known = set(writes.steps) if writes else set()
    steps = {files.key_of(name)[1]: name for name in names}
    return [Event(step, "checkpoint", f"{name} is on disk") for step, name in steps.items() if step not in known]


def notable(events: list[Event]) -> list[Event]:
    """All but checkpoints, and of these the last ones; few enough to read."""
    rest = [event for event in events if event.kind != "checkpoint"][-SHOWN:]
    saves = [event for event in events if event.kind == "checkpoint"][-50:]
    return sorted([*rest, *saves], key=lambda event: event.step)
