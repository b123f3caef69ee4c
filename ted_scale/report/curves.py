"""Which of a run's numbers are drawn together. What has no place of its own is drawn last, so that a new number is never missing.

A single run has a chart for each kind of number, with its terms as lines; several runs have a chart for each number, with a line a run.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ted_scale.report.charts import Chart, Heat, Line
from ted_scale.report.folder import RunSeen

LAYER = re.compile(r"^(.+)/(\d+)$")  # KIND/LAYER


class Group(NamedTuple):
    """Numbers that one chart of a single run shows."""

    section: str
    title: str
    keys: str  # a regular expression
    about: str
    y: str = ""


GROUPS = (
    Group("loss", "Loss by term", r"loss/(total|ce|kl|layer)", "The mean of each term over the steps since the row before. Total is the weighted sum.", "nats"),
    Group("loss", "Held-out loss", r"val/(loss|teacher_loss)", "On text that is never trained on; the teacher reads the same text.", "nats"),
    Group("optimizer", "Learning rate", r"optim/lr", "As the schedule gave it."),
    Group("optimizer", "Gradient norms", r"optim/grad_norm\w*", "Before clipping; student and filters are clipped apart."),
    Group("optimizer", "Weights and shares of terms", r"loss/(layer_weight|kl_share)", "What loss.balance and teacher.every made of the terms."),
    Group("optimizer", "Dropped updates", r"optim/skipped", "Steps so far whose update was dropped."),
    Group("speed", "Throughput", r"perf/tokens_per_s", "Over all ranks.", "tokens/s"),
    Group("speed", "Share of the devices' peak", r"perf/(mfu|hfu)", "MFU counts the FLOPs that the steps need, HFU those with recomputed activations too."),
    Group("speed", "Time of a step, and its forecast", r"perf/(step_ms|forecast_ms)", "The plan's forecast beside what was measured.", "ms"),
    Group("speed", "Where a step's time goes", r"perf/(data_wait_ms|teacher_ms|other_ms)", "Waiting for data, the teacher's forward, and all the rest: the student's forward, backward and update.", "ms"),
    Group("speed", "Where all the time goes", r"perf/(goodput|lost_\w+)", "Shares of the time since the run first began, over all starts; they add up to 1."),
    Group("memory", "Memory of a rank, and its forecast", r"memory/\w+", "The peak of rank 0 so far beside the plan.", "GiB"),
    Group("data", "Tokens read, by corpus", r"data/[^/]+/tokens", "In this stage. A steeper line has more weight in the blend.", "tokens"),
    Group("data", "Epochs, by corpus", r"data/[^/]+/epoch", "How often a corpus has been read to its end in this stage."),
    Group("data", "Weights of an adaptive blend", r"blend/[^/]+/weight", "As they were measured at the borders."),
    Group("data", "Held-out loss, by corpus", r"val/(?!suite/)[^/]+/(loss|teacher_loss)", "Of student and teacher.", "nats"),
    Group("evaluation", "Scores of the suite", r"val/suite/.+", "Asked of the student as it stood."),
)  # fmt: skip
UNDRAWN = re.compile(r"checkpoint/\w+|perf/restart_\w+|data/[^/]+/epoch_tokens|val/(.+/)?(teacher_)?ppl|blend/[^/]+/(teacher_)?ppl")


def charts(runs: list[RunSeen]) -> dict[str, list[Chart | Heat]]:
    """By section, in the order of GROUPS; layers and what is left have sections of their own."""
    found: dict[str, list[Chart | Heat]] = {}
    layered, drawn = layered_keys(runs), set()
    for group in GROUPS:
        keys = [key for key in keys_of(runs) if re.fullmatch(group.keys, key) and key not in layered]
        drawn |= {*keys}
        found.setdefault(group.section, []).extend(together(runs, group, keys) if len(runs) == 1 else apart(runs, group, keys))
    found["layers"] = of_layers(runs, layered)
    rest: dict[str, list[str]] = {}
    for key in keys_of(runs):
        if key not in drawn and key not in layered and not UNDRAWN.fullmatch(key):
            rest.setdefault(key.rpartition("/")[0] or key, []).append(key)
    for name, keys in rest.items():
        group = Group("more", name, "", "Numbers of the run that have no section of their own.")
        found.setdefault("more", []).extend(together(runs, group, keys) if len(runs) == 1 else apart(runs, group, keys))
    return found


def keys_of(runs: list[RunSeen]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.series))


def layered_keys(runs: list[RunSeen]) -> dict[str, tuple[str, int]]:
    """(kind, layer) of keys such as loss/layer/3. The name of a corpus may be a number, so data, blend and val have none."""
    matches = {key: LAYER.match(key) for key in keys_of(runs) if not key.startswith(("data/", "blend/", "val/"))}
    return {key: (match[1], int(match[2])) for key, match in matches.items() if match}


def together(runs: list[RunSeen], group: Group, keys: Iterable[str]) -> list[Chart]:
    lines = [line_of(runs, 0, key, short(key, group)) for key in keys]
    return [Chart(slug(group.section, group.title), group.title, group.about, lines, group.y, marks(runs))] if lines else []


def apart(runs: list[RunSeen], group: Group, keys: Iterable[str]) -> list[Chart]:
    made = []
    for key in keys:
        lines = [line_of(runs, number, key, run.name) for number, run in enumerate(runs) if key in run.series]
        title = group.title if group.keys == re.escape(key) or len(group.keys) == len(key) else f"{group.title}: {short(key, group)}"
        made.append(Chart(slug(group.section, key), title, group.about, lines, group.y, marks(runs)))
    return made


def of_layers(runs: list[RunSeen], layered: dict[str, tuple[str, int]]) -> list[Chart | Heat]:
    """For each kind: a heat-map a run, the lines of a single run, and for several runs the last values over the layers."""
    made: list[Chart | Heat] = []
    kinds: dict[str, list[tuple[int, str]]] = {}
    for key, (kind, layer) in layered.items():
        kinds.setdefault(kind, []).append((layer, key))
    for kind, pairs in kinds.items():
        for number, run in enumerate(runs):
            lines = [line_of(runs, number, key, str(layer)) for layer, key in sorted(pairs) if key in run.series]
            if not lines:
                continue
            of_run = f" of {run.name}" if len(runs) > 1 else ""
            heat = "Colour is the greatest value of a stretch of steps; layers from the bottom up. Its axis is steps."
            made.append(Heat(slug("heat", f"{kind}-{number}"), f"{kind} by layer and time{of_run}", heat, lines))
            if len(runs) == 1:
                made.append(Chart(slug("layers", kind), f"{kind} by layer", "A line a matched pair.", lines, "", marks(runs)))
        if len(runs) > 1:
            made.append(last_by_layer(runs, kind, sorted(pairs)))
    return made


def last_by_layer(runs: list[RunSeen], kind: str, pairs: list[tuple[int, str]]) -> Chart:
    lines = []
    for run in runs:
        ends = [(layer, run.last(key)) for layer, key in pairs if run.last(key) is not None]
        if ends:
            lines.append(Line(run.name, -1, *zip(*ends, strict=True)))
    return Chart(slug("layers", kind), f"{kind}: the last value over the layers", "The axis is the number of the pair.", lines)


def line_of(runs: list[RunSeen], number: int, key: str, label: str) -> Line:
    series = runs[number].series[key]
    return Line(label, number, np.asarray(series.steps), np.asarray(series.values))


def marks(runs: list[RunSeen]) -> tuple[tuple[int, int], ...]:
    """Restarts and rewinds, at most 100 of them."""
    found = [(number, e.step) for number, run in enumerate(runs) for e in run.events if e.kind in ("restart", "rewind")]
    return tuple(dict.fromkeys(found))[-100:]


def short(key: str, group: Group) -> str:
    """The key without what all keys of its chart begin with, and a corpus without the word that all have."""
    parts = key.split("/")
    if group.section == "data":
        return f"{parts[1]}, teacher" if parts[-1] == "teacher_loss" else parts[1]
    return "/".join(parts[2:] if key.startswith("val/suite/") else parts[1:]) or key


def slug(section: str, title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{section}-{title}".lower()).strip("-")
