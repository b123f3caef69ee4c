"""Document lengths of a corpus, as bins and as an SVG picture without dependencies. inspect_corpus.py calls it.

Note: bins are equally wide on the logarithmic axis only from four tokens up, because no length is between one and two.
"""

import math
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 70, 70
INK, FAINT, BAR, LINE = "#222222", "#dddddd", "#4c78a8", "#c44e52"


class Lengths(NamedTuple):
    """Every length that occurs, ascending, and how many documents have it."""

    values: numpy.ndarray
    counts: numpy.ndarray

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def median(self) -> int:
        return int(self.values[numpy.searchsorted(numpy.cumsum(self.counts), (self.documents + 1) // 2)])

    @property
    def mean(self) -> float:
        return float(self.values @ self.counts) / self.documents


def bins(lengths: Lengths, per_doubling: int) -> list[tuple[int, int, int]]:
    """(first length, first length of the next bin, documents) from the shortest document's bin to the longest's."""
    doublings = math.log2(max(int(lengths.values[-1]), 1)) + 1
    powers = {math.ceil(2 ** (n / per_doubling)) for n in range(math.ceil(doublings * per_doubling) + 1)}
    edges = numpy.array(sorted({0} | powers))
    held = numpy.zeros(len(edges) - 1, numpy.int64)
    numpy.add.at(held, numpy.searchsorted(edges, lengths.values, side="right") - 1, lengths.counts)
    inside = numpy.flatnonzero(held)
    return [(int(edges[n]), int(edges[n + 1]), int(held[n])) for n in range(inside[0], inside[-1] + 1)]


def picture(title: str, lengths: Lengths) -> str:
    """The SVG: bars of documents over their length, with the median marked."""
    bars = bins(lengths, 2)
    first, last, top = max(bars[0][0], 0.5), bars[-1][1], nice(max(count for _, _, count in bars))

    def x(length: float) -> float:
        share = math.log(max(length, first) / first) / math.log(last / first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(count: float) -> float:
        return round(HEIGHT - BOTTOM - count / top * (HEIGHT - TOP - BOTTOM), 1)

    floor = HEIGHT - BOTTOM
    parts = [text(WIDTH / 2, 28, title, size=17), text(WIDTH / 2, 50, subtitle(lengths), size=13)]
    for step in range(5):
        at = y(top * step / 4)
        parts += [line(LEFT, at, WIDTH - RIGHT, at, FAINT), text(LEFT - 8, at + 4, short(top * step / 4), anchor="end")]
    for begin, end, count in bars:
        parts.append(
            f'<rect x="{x(begin)}" y="{y(count)}" width="{max(x(end) - x(begin) - 1, 0.5):.1f}" '
            f'height="{floor - y(count):.1f}" fill="{BAR}"><title>{begin:,} to {end - 1:,} tokens: {count:,}</title></rect>'
        )
    for length in ticks(first, last):
        parts += [line(x(length), floor, x(length), floor + 6, INK), text(x(length), floor + 21, short(length))]
    middle = x(lengths.median)
    parts += [
        line(middle, TOP - 6, middle, floor, LINE, 'stroke-dasharray="5 4"'),
        line(LEFT, floor, WIDTH - RIGHT, floor, INK),
    ]
    parts.append(text(WIDTH / 2, HEIGHT - 18, "tokens in a document (logarithmic)", size=14))
    parts.append(text(-(TOP + floor) / 2, 24, "documents", size=14, more='transform="rotate(-90)"'))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="sans-serif" fill="{INK}">\n<title>{escape(title)}</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def subtitle(lengths: Lengths) -> str:
    shortest, longest = int(lengths.values[0]), int(lengths.values[-1])
    return (
        f"{lengths.documents:,} documents: shortest {shortest:,}, median {lengths.median:,} (dashed), "
        f"mean {lengths.mean:,.0f}, longest {longest:,} tokens"
    )


def text(x: float, y: float, content: str, size: int = 12, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {more}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" {more}/>'


def ticks(first: float, last: float) -> list[int]:
    """1, 10, 100 … of the axis; 1, 2, 5, 10 … on a short axis."""
    steps = (1,) if last / first > 1000 else (1, 2, 5)
    candidates = [s * 10**n for n in range(13) for s in steps]
    return [c for c in candidates if first <= c <= last]


def nice(count: int) -> int:
    """The smallest of 4, 8, 20, 40, 80, 200 … that is at least the count: its quarters are round numbers."""
    return next(step * 10**n for n in range(18) for step in (4, 8, 20) if step * 10**n >= count)


def short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"
