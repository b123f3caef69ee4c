"""Tables and lists as HTML. Every text passes through `escape`, because names and logs may be a stranger's."""

import math
from html import escape


def table(head: list[str], rows: list[list[str]], title: str, *, wrap: bool = False) -> str:
    """The first column names its row. A wide table scrolls by itself, also by keys."""
    if not rows:
        return '<p class="none">None.</p>'
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    kind = ' class="wrap"' if wrap else ""
    return (
        f'<div class="scrolls" tabindex="0" role="region" aria-label="Table: {escape(title)}"><table{kind}>'
        f'<caption class="unseen">{escape(title)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def bullets(sentences: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def amount(value: float | None) -> str:
    """Four digits, and thousands apart."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def share(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1%}"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
