"""metrics.jsonl as rows: a line a step, of which a crash may have torn the last."""

import contextlib
import json
from pathlib import Path

from ted_scale.base.durable import write_durably
from ted_scale.base.parsing import fits, parse_json


def trim_rows(path: Path, step: int) -> None:
    """Forget the rows past the checkpoint that a run resumes from: it will write them again."""
    if not path.exists():
        return
    kept = [row for row in rows_in(path) if row["step"] <= step]
    write_durably(path, "".join(f"{json.dumps(row)}\n" for row in kept))


def rows_in(path: Path) -> list[dict]:
    """The rows that are whole: the machine may have stopped in the middle of one, and a disk may tear any."""
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            rows += [row] if fits(row, {"step": int}) else []
    return rows


def rows_at(path: Path, step: int) -> set[tuple]:
    """What stands of the step that a run resumes from: it measures some of it again."""
    rows = rows_in(path) if path.exists() else []
    return {(step, *list(row)[2:]) for row in rows if row["step"] == step}


def last_row(path: Path) -> int:
    return max((row["step"] for row in rows_in(path)), default=0) if path.is_file() else 0
