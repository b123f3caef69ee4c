"""The output of tools/bench/gpu.py: a CSV with one value a row, appended at once, and a page made from all rows.

The last row of a part is about the part: `ok`, `failed`, `skipped` or `late`, with the reason. The page is made from the rows
alone, so a second call also shows the measurements of the first.
"""

import csv
from pathlib import Path
from typing import NamedTuple

FACTS = ("hardware", "torch", "triton", "deepspeed", "transformers", "liger", "python", "commit")
COLUMNS = ("part", "figure", "arm", "value", "unit", "sizes", "status", "reason", "tiny", *FACTS)
PART = "part"  # the figure of the row about a part


class Row(NamedTuple):
    part: str
    figure: str
    arm: str = ""
    value: float | None = None
    unit: str = ""
    sizes: str = ""
    status: str = "ok"
    reason: str = ""


def append(path: Path, rows: list[Row], facts: dict) -> None:
    """Whole lines in one write, so a reader, or a kill of the writer, finds complete rows."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row._asdict() | {"value": plain(row.value), "reason": one_line(row.reason)} | facts)


def plain(value) -> str:
    return "" if value is None else f"{value:.6g}"


def one_line(text: str, most: int = 300) -> str:
    return " ".join(str(text).split())[:most]


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]  # an incomplete last line has too few


def last_status(rows: list[dict], tiny: str) -> dict[str, str]:
    """The last status of each part that started; rows of a rehearsal do not count for a measurement."""
    return {row["part"]: row["status"] for row in rows if row["figure"] == PART and row["tiny"] == tiny}


class Target(NamedTuple):
    part: str
    figure: str
    arm: str
    limit: float
    at_least: bool = False


# Of an H100: arithmetic at 680 TFLOP/s and 3 TB/s. Liger has published a row of 4096 + 4096: 60.7 ms and 11.1 GB.
TARGETS = (
    Target("b.kl_ce", "time", "ours-chunked", 39),
    Target("b.kl_ce", "memory", "ours-chunked", 1.3),
    Target("b.kl_ce", "time", "ours-strict", 60),
    Target("b.kl_ce", "memory", "ours-strict", 0.2),
    Target("b.kl_ce.liger", "time", "ours-chunked", 58),
    Target("b.kl_ce.liger", "memory", "ours-chunked", 1.6),
    Target("b.filtered_mse", "time", "ours", 10),
    Target("b.filtered_mse", "memory", "ours", 0.6),
    Target("b.ce", "time", "ours-chunked", 45),
    Target("b.rows", "share of copy bandwidth", "ours", 0.75, True),
    Target("b.gradient_error", "gradient error", "ours-chunked", 0.005),
    Target("c.8b.kd", "tokens/s beside plain", "ours", 1.3, True),
    Target("c.8b.kd", "memory beyond states beside plain", "ours", 0.4),
    Target("c.teacher.8b", "time beside bf16", "fp8 compiled", 0.65),
)


def write_page(page: Path, rows: list[dict], order: list[str]) -> None:
    newest = newest_rows(rows)
    of_speed = ["", *targets(newest)] if rows and not rows[-1]["tiny"] else []
    lines = ["# One GPU, one command", "", *about(rows), *of_speed, "", *parts(newest, order)]
    for letter in dict.fromkeys(name[0] for name in order):
        lines += group([row for row in newest if row["part"][0] == letter and row["figure"] != PART])
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def newest_rows(rows: list[dict]) -> list[dict]:
    """A part that ran twice counts as it ran last."""
    begun: dict[str, list[dict]] = {}
    for row in rows:
        group = begun.setdefault(row["part"], [])
        if group and group[-1]["figure"] == PART:
            group.clear()
        group.append(row)
    return [row for group in begun.values() for row in group]


def about(rows: list[dict]) -> list[str]:
    if not rows:
        return ["Nothing was measured yet."]
    last = next((row for row in reversed(rows) if row["hardware"]), rows[-1])
    versions = ", ".join(f"{name} {last[name]}" for name in FACTS if name != "hardware" and last[name])
    said = [f"{last['hardware']}; {versions}. rows.csv has every value, log.txt all output."]
    if last["tiny"]:
        said.append("A rehearsal: sizes are tiny, and no number here says anything about speed.")
    return said


def targets(rows: list[dict]) -> list[str]:
    """Targets for an H100, beside the measurements."""
    lines = ["| target | wanted | measured | |", "| --- | --- | --- | --- |"]
    for part, figure, arm, limit, at_least in TARGETS:
        found = next(
            (r for r in rows if (r["part"], r["figure"], r["arm"]) == (part, figure, arm) and r["value"]), None
        )
        value = float(found["value"]) if found else None
        met = value is not None and (value >= limit if at_least else value <= limit)
        said = "not measured" if found is None else f"{value:.3g} {found['unit']}"
        verdict = "" if found is None else "met" if met else "MISSED"
        lines.append(f"| {part}: {figure}, {arm} | {'≥' if at_least else '≤'} {limit:g} | {said} | {verdict} |")
    return lines


def parts(rows: list[dict], order: list[str]) -> list[str]:
    ends = {row["part"]: row for row in rows if row["figure"] == PART}
    lines = ["| part | ended | seconds | why |", "| --- | --- | --- | --- |"]
    for name in order:
        end = ends.get(name)
        lines.append(
            f"| {name} | {end['status']} | {end['value']} | {end['reason']} |" if end else f"| {name} | - | | |"
        )
    return lines


def group(rows: list[dict]) -> list[str]:
    """A table of figures by parts and arms. Below it remarks, and missing values with their reasons."""
    passed = [row for row in rows if row["arm"] == "passed"]
    good = [row for row in rows if row["status"] == "ok" and row not in passed]
    valued = [row for row in good if row["value"] and not row["figure"].startswith("op ")]
    lines = ["", *table(valued)] if valued else []
    told = [f"* {row['part']}: {row['reason']}" for row in good if not row["value"]]
    if passed:
        told.append(f"* {len(passed)} tests passed in {sum(float(row['value']) for row in passed):.0f} s")
    told += without_value([row for row in rows if row["status"] != "ok"])
    return [*lines, "", *told] if told else lines


def table(rows: list[dict]) -> list[str]:
    figures = list(dict.fromkeys(f"{row['figure']}{f' [{unit}]' if (unit := row['unit']) else ''}" for row in rows))
    cells, sizes = {}, {}
    for row in rows:
        place = f"{row['part']} {row['arm']}".strip()
        cells[place, row["figure"]] = f"{float(row['value']):.4g}"
        sizes[place] = sizes.get(place) or row["sizes"]
    names = [figure.partition(" [")[0] for figure in figures]
    head = [f"| | {' | '.join(figures)} | |", "| --- |" + " --- |" * (len(figures) + 1)]
    return head + [
        f"| {at} | {' | '.join(cells.get((at, n), '') for n in names)} | {said} |" for at, said in sizes.items()
    ]


def without_value(rows: list[dict]) -> list[str]:
    """One line a reason, however many figures have it."""
    reasons: dict[tuple, list[str]] = {}
    for row in rows:
        reasons.setdefault((row["part"], row["status"], row["reason"]), []).append(
            f"{row['figure']} {row['arm']}".strip()
        )
    return [
        f"* {part}: {named[0]}{f' and {len(named) - 1} more' if named[1:] else ''}: {status}, {reason}"
        for (part, status, reason), named in reasons.items()
    ]
