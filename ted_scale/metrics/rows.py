"""metrics.jsonl as rows, one a line. A crash may have cut off the last line."""

import contextlib
import json
from pathlib import Path

from ted_scale.base.durable import write_durably
from ted_scale.base.parsing import fits, parse_json


def trim_rows(path: Path, step: int) -> None:
    """Remove the rows after the checkpoint that a run resumes from: the run will write them again."""
    if not path.exists():
        return
    kept = [row for row in rows_in(path) if row["step"] <= step]
    write_durably(path, "".join(f"{json.dumps(row)}\n" for row in kept))


def rows_in(path: Path) -> list[dict]:
    """The rows that are whole. A line may be cut off, where the machine stopped, or damaged by the disk."""
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            rows += [row] if fits(row, {"step": int}) else []
    return rows


def rows_at(path: Path, step: int) -> set[tuple]:
    """The rows of the step that a run resumes from, by their keys: the run measures some of them again."""
    rows = rows_in(path) if path.exists() else []
    return {(step, *list(row)[2:]) for row in rows if row["step"] == step}


def last_row(path: Path) -> int:
    return max((row["step"] for row in rows_in(path)), default=0) if path.is_file() else 0
