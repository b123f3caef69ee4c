"""The charts of runs. What has no section of its own is drawn last, so that a new number is never missing.

Note: one run has a chart for each kind of number, with its terms as lines; several have one for each number, with a line a run.
"""

import re
from itertools import chain, count

import numpy as np

from ted_scale.report.charts import Chart, Heat, Line
from ted_scale.report.folder import RunSeen
from ted_scale.report.groups import GROUPS, OF_PAIRS, UNDRAWN, Group

HEAT = (
    "Colour is the greatest value of a stretch of steps, from the 1st to the 99th percentile; layers from the bottom up. Its axis "
    "is steps."
)
LAYER = re.compile(r"^(.+)/(\d{1,15})$")  # KIND/LAYER


def charts(runs: list[RunSeen]) -> dict[str, list[Chart | Heat]]:
    """By section, in the order of GROUPS; layers and what is left have sections of their own."""
    found: dict[str, list[Chart | Heat]] = {}
    layered, drawn = layered_keys(runs), set()
    for group in GROUPS:
        keys = [key for key in keys_of(runs) if re.fullmatch(group.keys, key) and key not in layered]
        drawn |= {*keys}
        found.setdefault(group.section, []).extend(
            together(runs, group, keys) if len(runs) == 1 else apart(runs, group, keys)
        )
    found["layers"] = of_layers(runs, layered)
    rest: dict[str, list[str]] = {}
    for key in keys_of(runs):
        if key not in drawn and key not in layered and not UNDRAWN.fullmatch(key):
            rest.setdefault(key.rpartition("/")[0] or key, []).append(key)
    for name, keys in rest.items():
        group = Group("more", name, "", "Numbers of the run that have no section of their own.")
        found.setdefault("more", []).extend(together(runs, group, keys) if len(runs) == 1 else apart(runs, group, keys))
    taken: set[str] = set()
    return {section: [with_own_key(chart, taken) for chart in made] for section, made in found.items()}


def keys_of(runs: list[RunSeen]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.series))


def layered_keys(runs: list[RunSeen]) -> dict[str, tuple[str, int]]:
    """(kind, layer) of keys such as loss/layer/3. The name of a corpus may be a number, so data, blend and val have none."""
    matches = {key: LAYER.match(key) for key in keys_of(runs) if not key.startswith(("data/", "blend/", "val/"))}
    return {key: (match[1], int(match[2])) for key, match in matches.items() if match}


def together(runs: list[RunSeen], group: Group, keys: list[str]) -> list[Chart]:
    lines = [line_of(runs, 0, key, short(key, group)) for key in keys]
    return (
        [Chart(slug(group.section, group.title), group.title, group.about, lines, group.y, marks(runs))]
        if lines
        else []
    )


def apart(runs: list[RunSeen], group: Group, keys: list[str]) -> list[Chart]:
    made = []
    for key in keys:
        lines = [line_of(runs, number, key, run.name) for number, run in enumerate(runs) if key in run.series]
        title = group.title if len(keys) == 1 else f"{group.title}: {short(key, group)}"
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
            title = f"{kind} by layer and time{of_run}"
            made.append(Heat(slug("heat", f"{kind}-{number}"), title, told(kind, HEAT), lines))
            if len(runs) == 1:
                about = told(kind, "A line a matched pair.")
                made.append(Chart(slug("layers", kind), f"{kind} by layer", about, lines, "", marks(runs)))
        if len(runs) > 1:
            made.append(last_by_layer(runs, kind, sorted(pairs)))
    return made


def last_by_layer(runs: list[RunSeen], kind: str, pairs: list[tuple[int, str]]) -> Chart:
    lines = []
    for run in runs:
        ends = [(layer, run.last(key)) for layer, key in pairs if run.last(key) is not None]
        if ends:
            lines.append(Line(run.name, -1, *zip(*ends, strict=True)))
    about = told(kind, "The axis is the number of the pair.")
    return Chart(slug("layers", kind), f"{kind}: the last value over the layers", about, lines)


def told(kind: str, how: str) -> str:
    return f"{OF_PAIRS[kind]} {how}" if kind in OF_PAIRS else how


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
    """Its hyphen keeps it apart from the section's own id."""
    return f"{section}-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def with_own_key(chart: Chart | Heat, taken: set[str]) -> Chart | Heat:
    """The first running number that is free tells charts apart whose names have no Latin letter to tell them by."""
    names = chain([chart.key], (f"{chart.key}-{number}" for number in count(2)))
    key = next(name for name in names if name not in taken)
    taken.add(key)
    return chart._replace(key=key)
