"""One page of everything: style, Bokeh and data are inside it, and its own policy forbids the browser to fetch anything.

Note: Bokeh alone is 1.3 MB, without its widgets, tables and WebGL; a figure is drawn when it comes into view.
"""

import json
import time
from html import escape
from pathlib import Path

import numpy as np
from bokeh.resources import Resources

from ted_scale.base.durable import write_durably
from ted_scale.base.errors import files_at
from ted_scale.report import summary
from ted_scale.report.charts import html
from ted_scale.report.colours import INKS, LINES, variables
from ted_scale.report.curves import charts
from ted_scale.report.folder import RunSeen, proper, read_run

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
CLOCK_POINTS = 400  # of a run, by which steps become tokens and seconds
SECTIONS = {
    "loss": "Loss", "differences": "Differences", "layers": "Layers", "vitals": "Vitals", "optimizer": "Optimizer",
    "speed": "Speed", "memory": "Memory", "data": "Data", "events": "Time line", "samples": "Samples", "evaluation": "Evaluation",
    "more": "More numbers", "run": "The run",
}  # fmt: skip


def write(folders: list[Path], out: Path) -> Path:
    """One page for all folders; it replaces `out` when it is whole."""
    with files_at(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, render([read_run(folder) for folder in folders]))
    return out


def render(runs: list[RunSeen]) -> str:
    runs = with_names_apart(runs)
    drawn = charts(runs)
    body = {key: "".join(map(html, drawn.get(key, []))) for key in SECTIONS}
    body["differences"] = summary.differences(runs) if len(runs) > 1 else ""
    body["events"] = summary.time_line(runs)
    body["samples"] = summary.samples(runs)
    body["evaluation"] = summary.scores(runs) + body["evaluation"]
    body["run"] = f"<h3>What changed at each resume</h3>{summary.changes(runs)}{summary.settings(runs)}"
    shown = {key: text or '<p class="none">The runs have no such numbers.</p>' for key, text in body.items()}
    for key in ("differences", "more"):
        if not body[key]:
            del shown[key]
    return document(runs, shown)


def with_names_apart(runs: list[RunSeen]) -> list[RunSeen]:
    names = [run.name for run in runs]
    return [run._replace(name=proper(str(run.folder))) if names.count(run.name) > 1 else run for run in runs]


def document(runs: list[RunSeen], sections: dict[str, str]) -> str:
    title = f"Report: {', '.join(run.name for run in runs)}"
    links = "".join(f'<a href="#{key}">{SECTIONS[key]}</a>' for key in sections)
    whole = "".join(f'<section id="{key}"><h2>{SECTIONS[key]}</h2>{text}</section>' for key, text in sections.items())
    library = Resources(mode="inline", components=["bokeh"], log_level="error").js_raw
    inside = [
        text.replace("</script", "<\\/script") for text in [*library, (HERE / "page.js").read_text(encoding="utf-8")]
    ]
    scripts = "".join(f"<script>{text}</script>" for text in inside)
    data = json.dumps({"times": [times(run) for run in runs], "lines": LINES, "inks": INKS}, allow_nan=False)
    made = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>
<style>:root {{ {variables("light")} }} [data-theme=dark] {{ {variables("dark")} }}
{(HERE / "page.css").read_text(encoding="utf-8")}</style></head>
<body><a class="skip" href="#main">To the charts</a>
<header><h1>{escape(title)}</h1><p>Made at {made}.</p>
<div class="controls"><fieldset><legend>Curves against</legend>
{radio("axis", ("steps", "tokens", "seconds"))}</fieldset>
<fieldset><legend>Colours</legend>{radio("theme", ("system", "light", "dark"))}</fieldset></div>
<nav aria-label="Sections">{links}</nav></header>
<main id="main" tabindex="-1"><section id="overview"><h2>Where it stands</h2>{summary.overview(runs)}
<h3>What is missing</h3>{summary.missing(runs)}</section>{whole}</main>
<script type="application/json" id="all-runs">{data}</script>
{scripts}</body></html>
"""


def radio(name: str, choices: tuple[str, ...]) -> str:
    return "".join(
        f'<label><input type="radio" name="{name}" value="{choice}"{" checked" * (choice == choices[0])}>{choice}</label>'
        for choice in choices
    )


def times(run: RunSeen) -> dict[str, list[float]]:
    """Steps, tokens and seconds at some hundred rows."""
    chosen = (
        np.unique(np.linspace(0, max(0, len(run.times.steps) - 1), CLOCK_POINTS).astype(int)) if run.times.steps else []
    )
    columns = {name: np.asarray(column) for name, column in run.times._asdict().items()}
    return {name: [0.0, *(round(float(column[place]), 3) for place in chosen)] for name, column in columns.items()}
