"""A chart as Bokeh draws it, and around it what a canvas lacks: a heading, a legend of buttons, words, and a table of its numbers.

Colours are not in the figure: page.js paints it for the theme, from the number in each line's `tags`. Note: a figure's x values are
steps; page.js keeps them as the column "step", and makes tokens or seconds of x by the run whose number is the second tag.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColorBar,
    ColumnDataSource,
    DataRange1d,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    PanTool,
    ResetTool,
    SaveTool,
    Span,
)
from bokeh.plotting import figure

from ted_scale.report.colours import HEAT, dash_of
from ted_scale.report.tables import amount, table
from ted_scale.report.thinning import binned, thin

POINTS, LEAST_STRETCHES, MOST_STRETCHES = 6_000, 16, 400  # of all lines of a chart; stretches of a line
FEW = 40  # points of a line that are also drawn one by one: a single one would not be seen
BINS, CELLS = 240, 5_000  # of a heat-map: along its time, and in all
# Percentiles at which its colours end: the first steps, or one spike, would leave one colour to all others.
SPAN = (1, 99)
HEIGHT = 300
EXACT = "%.6g"  # of what a pointer reads: 0.00003 is a learning rate
LARGE_UNITS = ("tokens", "tokens/s")
SHARES = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 1)  # of a line's way, where its table has a value


class Line(NamedTuple):
    label: str
    run: int  # number, whose tokens and seconds the x axis may show
    steps: Sequence[float]
    values: Sequence[float]


class Chart(NamedTuple):
    key: str  # names it in the page
    title: str
    about: str
    lines: list[Line]
    y: str = ""
    marks: tuple[tuple[int, int], ...] = ()  # (run, step) of restarts and rewinds
    dots: bool = False  # no line between the points
    names: tuple[str, ...] = ()  # of y = 0, 1, 2, ...


class Heat(NamedTuple):
    key: str
    title: str
    about: str
    lines: list[Line]  # from the bottom up


def html(chart: Chart | Heat) -> str:
    """The chart's figure element; its drawing is made when it comes into view."""
    item = json.dumps(item_of(chart), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    legend = "" if isinstance(chart, Heat) or len(chart.lines) < 2 else legend_of(chart)
    keys = "Arrow keys read the values along the chart, plus and minus zoom, 0 shows all."
    return (
        f'<figure class="chart" id="{chart.key}"><figcaption><h3>{escape(chart.title)}</h3>'
        f"<p>{escape(chart.about)}</p></figcaption>{legend}"
        f'<div class="plot" id="plot-{chart.key}" tabindex="0" role="img" aria-roledescription="chart" '
        f'aria-label="{escape(words(chart))} {keys}"></div><p class="readout" role="status"></p>'
        f"<details><summary>Numbers of this chart</summary>{numbers(chart)}</details>"
        f'<script type="application/json" class="item">{item}</script></figure>'
    )


def legend_of(chart: Chart) -> str:
    entries = "".join(
        f'<li><button type="button" aria-pressed="true" data-line="{number}"><i class="dash-{dash_of(number)}" '
        f'style="border-color: var(--line{number % 8})"></i>{escape(line.label)}</button></li>'
        for number, line in enumerate(chart.lines)
    )
    return f'<ul class="legend" aria-label="Lines; press one to hide or show it">{entries}</ul>'


def words(chart: Chart | Heat) -> str:
    """What a glance at the chart tells, for those who cannot glance."""
    said = []
    for line in chart.lines[:6]:
        values = finite(line.values)
        if len(values):
            said.append(f"{line.label} from {amount(float(values[0]))} to {amount(float(values[-1]))}")
    more = f", and {len(chart.lines) - 6} more" if len(chart.lines) > 6 else ""
    return f"{chart.title}: {'; '.join(said) or 'no finite value'}{more}."


def finite(values) -> np.ndarray:
    values = np.asarray(values, float)
    return values[np.isfinite(values)]


def numbers(chart: Chart | Heat) -> str:
    head = [
        "",
        "first",
        "least",
        "at step",
        "greatest",
        "at step",
        "last",
        *(f"{share:.0%} of its way" for share in SHARES[1:-1]),
    ]
    return table(head, [summary(line) for line in chart.lines], chart.title)


def summary(line: Line) -> list[str]:
    steps, values = np.asarray(line.steps, float), np.asarray(line.values, float)
    there = np.isfinite(values)
    steps, values = steps[there], values[there]
    if not len(values):
        return [line.label, *["-"] * (len(SHARES) + 4)]
    least, most = int(np.argmin(values)), int(np.argmax(values))
    ends = [float(v) for v in (values[0], values[least], steps[least], values[most], steps[most], values[-1])]
    between = [float(values[int(share * (len(values) - 1))]) for share in SHARES[1:-1]]
    shown = [f"{value:,.0f}" if place in (2, 4) else amount(value) for place, value in enumerate(ends)]
    return [line.label, *shown, *map(amount, between)]


def item_of(chart: Chart | Heat) -> dict:
    drawn = heat_figure(chart) if isinstance(chart, Heat) else line_figure(chart)
    return dict(json_item(drawn))


def empty_figure(y: str, **more):
    drawn = figure(
        height=HEIGHT, sizing_mode="stretch_width", tools=[], toolbar_location="above", x_axis_label="step", y_axis_label=y or None,
        background_fill_color=None, border_fill_color=None, outline_line_color=None, min_border_right=16, **more,
    )  # fmt: skip
    drawn.add_tools(BoxZoomTool(dimensions="width"), PanTool(dimensions="width"), ResetTool(), SaveTool())
    drawn.toolbar.active_drag = None  # a finger that scrolls the page must not zoom
    drawn.toolbar.logo = None
    drawn.toolbar.autohide = True
    for axis in [drawn.xaxis, *([drawn.yaxis] if y in LARGE_UNITS else [])]:
        axis.formatter = NumeralTickFormatter(format="0.[00]a")
    drawn.xaxis.ticker = BasicTicker(desired_num_ticks=6)
    return drawn


def line_figure(chart: Chart):
    # What is seen of the curves sets the range, so that a zoom past the first steps shows the others at their own height.
    fitted = {"y_range": DataRange1d(only_visible=True), "window_axis": "x"}
    drawn = empty_figure(chart.y, **({"y_range": (-0.6, len(chart.names) - 0.4)} if chart.names else fitted))
    stretches = max(LEAST_STRETCHES, min(MOST_STRETCHES, POINTS // (4 * max(1, len(chart.lines)))))
    for number, line in enumerate(chart.lines):
        steps, values = thin(line.steps, line.values, stretches)
        about = {"source": ColumnDataSource({"x": whole(steps), "y": values.astype("f4")}), "name": line.label}
        tags = [number, line.run]
        if not chart.dots:
            plain(drawn.line("x", "y", line_width=1.8, line_dash=dash_of(number), **about), tags)
        if chart.dots or len(values) <= FEW:
            size = 9 if chart.dots else 5
            plain(drawn.scatter("x", "y", size=size, line_width=1.5, fill_alpha=0.35, **about), tags)
    for run, step in chart.marks:
        drawn.add_layout(
            Span(location=float(step), dimension="height", line_dash="dotted", line_width=1, tags=[step, run])
        )
    if chart.names:
        drawn.yaxis.ticker = list(range(len(chart.names)))
        drawn.yaxis.major_label_overrides = dict(enumerate(chart.names))
    said = [("", "$name"), ("step", "@step{0,0}"), ("", f"$snap_y{{{EXACT}}}")]
    drawn.add_tools(HoverTool(tooltips=said, formatters={"$snap_y": "printf"}))
    return drawn


def plain(drawn, tags: list[int]) -> None:
    """Without the two other looks that Bokeh writes down for each line: nothing can be selected. As an argument of `line`, tags
    would be those of the glyph."""
    drawn.tags, drawn.nonselection_glyph, drawn.muted_glyph = tags, None, None


def whole(steps: np.ndarray) -> np.ndarray:
    """As small as they may be: a page has many."""
    return steps.astype("i4") if steps.max(initial=0) < 2**31 else steps


def heat_figure(chart: Heat):
    """All rows have one scale of colours."""
    first = min((line.steps[0] for line in chart.lines), default=0)
    last = max((line.steps[-1] for line in chart.lines), default=1)
    bins = max(1, min(BINS, CELLS // len(chart.lines), max(len(line.steps) for line in chart.lines)))
    picture = np.array([filled(binned(line.steps, line.values, first, last, bins)) for line in chart.lines])
    there = picture[np.isfinite(picture)]
    low, high = map(float, np.percentile(there, SPAN)) if len(there) else (0.0, 0.0)
    mapper = LinearColorMapper(
        palette=HEAT, low=low, high=high if high > low else low + 1, nan_color="rgba(0, 0, 0, 0)"
    )
    drawn = empty_figure("", y_range=(-0.5, len(chart.lines) - 0.5))
    drawn.tags = ["heat"]
    place = {"x": float(first), "y": -0.5, "dw": float(max(last - first, 1)), "dh": len(chart.lines)}
    drawn.image(image=[picture.astype("f4")], color_mapper=mapper, **place)
    drawn.yaxis.ticker = sorted({*range(0, len(chart.lines), max(1, len(chart.lines) // 8))})
    drawn.yaxis.major_label_overrides = {number: line.label for number, line in enumerate(chart.lines)}
    drawn.add_layout(ColorBar(color_mapper=mapper, width=10, padding=4, background_fill_color=None), "right")
    said = [("layer", "$y{0}"), ("step", "$x{0,0}"), ("", f"@image{{{EXACT}}}")]
    drawn.add_tools(HoverTool(tooltips=said, formatters={"@image": "printf"}))
    return drawn


def filled(values: np.ndarray) -> np.ndarray:
    """A stretch without a row has the colour of the one before: rows may be rarer than bins."""
    there = np.isfinite(values)
    if not there.any():
        return values
    before = np.maximum.accumulate(np.where(there, np.arange(len(values)), -1))
    return np.where(before >= 0, values[np.maximum(before, 0)], math.nan)
