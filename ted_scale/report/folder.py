"""A run's folder as a report sees it: numbers by key, the run file, samples, scores, and sentences about what is missing.

Nothing in here ends a report: a file that is absent, torn or a stranger's becomes a sentence. Note: rows carry no time of day, so
the seconds of a row are the training time until it, of the steps that count: a step's mean time in each row, added up.
"""

import contextlib
import math
import os
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

from ted_scale.base import redact
from ted_scale.base.errors import UserError
from ted_scale.base.parsing import fits, is_count, parse_json, parse_toml, parsed
from ted_scale.base.paths import NoFile, open_file
from ted_scale.checkpoints import life
from ted_scale.config.changes import flat
from ted_scale.metrics.rows import SAMPLES, lines_in
from ted_scale.report.events import Event, events_of

LARGEST_TEXT = 2**24  # bytes of a run file, a log's end or a file of samples
MOST_STEPS, LONGEST_MS = 10**15, 1e12  # a step is at most 30 years; sums of both stay finite
WITHIN = ("perf/data_wait_ms", "perf/teacher_ms")  # parts of perf/step_ms
SCORES = "evaluation*.json"


class Series(NamedTuple):
    """One number of a run, where rows have it."""

    steps: array
    values: array  # NaN where the run had a number that is not finite


class Times(NamedTuple):
    """Tokens and seconds at steps, for the axes of all curves."""

    steps: array
    tokens: array
    seconds: array


class RunSeen(NamedTuple):
    name: str
    folder: Path
    series: dict[str, Series]
    times: Times
    settings: dict  # the run file by dotted names
    toml: str
    life: life.Life | None
    events: list[Event]
    samples: list[dict]
    scores: list[dict]
    missing: list[str]

    @property
    def method(self) -> str:
        return str(self.settings.get("method", "unknown"))

    @property
    def step(self) -> int:
        return int(self.times.steps[-1]) if self.times.steps else 0

    @property
    def total_steps(self) -> int | None:
        """None if the run file is missing or a stranger's."""
        first = self.settings.get("filters.steps", 0) if self.method == "ted" else 0
        counts = (self.settings.get("train.steps"), first)
        return sum(counts) if all(is_count(count) and count < MOST_STEPS for count in counts) else None

    def last(self, key: str) -> float | None:
        found = self.series.get(key)
        return found.values[-1] if found and math.isfinite(found.values[-1]) else None


def read_run(folder: Path) -> RunSeen:
    """What is missing or cannot be read becomes a sentence of the result, never an error."""
    missing: list[str] = []
    series, times = read_rows(folder / "metrics.jsonl", missing)
    toml = text_of(folder / "run.toml", missing)
    settings = settings_of(toml, missing)
    samples = read_lines(folder / SAMPLES, missing)
    last = life.read(folder)
    if last is None:
        missing.append("life.json is not there or cannot be read: nothing is known of the run's whole time and its end")
    events = events_of(folder, text_of(folder / "log.txt", missing, end=True), series)
    scores = [found for path in sorted(folder.glob(SCORES)) if (found := scores_in(path, missing))]
    name = proper(str(settings.get("name", folder.resolve().name)))
    return RunSeen(name, folder, series, times, settings, toml, last, events, samples, scores, proper(missing))


def read_rows(path: Path, missing: list[str]) -> tuple[dict[str, Series], Times]:
    series: dict[str, Series] = {}
    times, torn = Times(array("d"), array("d"), array("d")), 0
    seconds, before = 0.0, 0
    try:
        for line in lines_in(path):
            row = whole_row(line)
            if row is None:
                torn += 1
                continue
            step = row["step"]
            if (each := row.get("perf/step_ms")) is not None:
                row["perf/other_ms"] = max(0.0, each - sum(row.get(part) or 0.0 for part in WITHIN))
                seconds, before = seconds + max(0, step - before) * each / 1e3, step
            if not times.steps or step > times.steps[-1]:
                for column, value in zip(times, (step, row["tokens"], seconds), strict=True):
                    column.append(value)
            elif each is not None:
                times.seconds[-1] = seconds
            add(series, step, row)
    except (OSError, UserError) as error:
        missing.append(f"{path.name} cannot be read ({said(error)}): there are no curves")
        return series, times
    if torn:
        lines = f"{torn:,} lines that are" if torn > 1 else "1 line that is"
        missing.append(f"{path.name} has {lines} torn or damaged and left out")
    if not series:
        missing.append(f"{path.name} has no row yet: the run has not taken a step")
    return series, times


def whole_row(line: bytes) -> dict | None:
    """A row of numbers; None for a line that a crash has cut off or a disk has damaged."""
    with contextlib.suppress(ValueError):
        row = json_in(line.decode(errors="replace"))
        if fits(row, {"step": int, "tokens": int}) and all(map(is_number, row.values())) and is_in_bounds(row):
            return row
    return None


def is_in_bounds(row: dict) -> bool:
    """Whether its step and its time can be added up: a damaged digit must not make the axes infinite."""
    each = row.get("perf/step_ms")
    return row["step"] < MOST_STEPS and (each is None or 0 <= each < LONGEST_MS)


def json_in(text: str):
    """JSON may have halves of surrogate pairs, which no file can hold; here none is left."""
    found = parse_json(text)
    return parsed(proper, found) if "\\u" in text else found


def proper(value):
    """The same with every text fit to be written."""
    if isinstance(value, dict):
        return {proper(key): proper(one) for key, one in value.items()}
    if isinstance(value, list):
        return [proper(one) for one in value]
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def is_number(value) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300)


def add(series: dict[str, Series], step: int, row: dict) -> None:
    for key, value in row.items():
        if key not in ("step", "tokens"):
            found = series.get(key)
            if found is None:
                found = series[key] = Series(array("d"), array("d"))
            found.steps.append(step)
            found.values.append(math.nan if value is None else value)


def text_of(path: Path, missing: list[str], *, end: bool = False) -> str:
    """A text file, or the end of a long one; "" with a sentence if there is none."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_TEXT:
                if not end:
                    raise ValueError(f"it has more than {LARGEST_TEXT:,} bytes")
                file.seek(size - LARGEST_TEXT)
                missing.append(f"{path.name} is long: events before its last {LARGEST_TEXT >> 20} MiB are left out")
            return redact.redact(file.read(LARGEST_TEXT).decode(errors="replace"))
    except (OSError, NoFile, ValueError) as error:
        missing.append(f"{path.name} cannot be read ({said(error)})")
    return ""


def settings_of(toml: str, missing: list[str]) -> dict:
    try:
        found = parsed(flat, parse_toml(toml))
        for value in found.values():
            str(value)  # a ValueError here, not in the page, for an integer of more digits than Python writes
        return found
    except ValueError as error:
        missing.append(f"run.toml is damaged ({said(error)}): the resolved run is not known")
        return {}


def read_lines(path: Path, missing: list[str]) -> list[dict]:
    """Samples: {"step", "prompt", "student", "teacher"}, one a line; a run need not have any."""
    if not path.is_file():
        return []
    found = []
    for line in text_of(path, missing).splitlines():
        with contextlib.suppress(ValueError):
            sample = json_in(line)
            if fits(sample, {"prompt": str, "student": str}, {"step": int, "teacher": str}):
                found.append(sample)
    return found


def scores_in(path: Path, missing: list[str]) -> dict | None:
    """What `ted-scale evaluate --json` wrote, if somebody put it there."""
    try:
        found = json_in(text_of(path, missing))
        rows = [row_of(model["model"], score) for model in found["models"] for score in model["scores"]]
        return {"file": proper(path.name), "rows": rows}
    except (ValueError, TypeError, KeyError):
        missing.append(f"{path.name} is no file of scores as ted-scale evaluate --json writes it")
    return None


def row_of(model: str, score: dict) -> tuple[str, str, str, float, float | None]:
    what, metric, value, error = score["what"], score["metric"], score["value"], score.get("error")
    if not all(isinstance(text, str) for text in (model, what, metric)):
        raise TypeError("model, what and metric must be texts")
    if value is None or not (is_number(value) and is_number(error)):
        raise TypeError("value and error must be numbers")
    return model, what, metric, value, error


def said(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def at_step(times: Times, column: array, step: float) -> float:
    """Tokens or seconds at a step, by the row before it."""
    place = bisect_right(times.steps, step) - 1
    return column[place] if place >= 0 else 0.0
