"""metrics.jsonl and samples.jsonl as rows, one row a line. A crash may have cut off the last line."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ted_scale.base.beneath import as_sentence
from ted_scale.base.durable import write_durably
from ted_scale.base.errors import UserError, files_at
from ted_scale.base.parsing import fits, parse_json
from ted_scale.base.paths import open_file

NAME, SAMPLES = "metrics.jsonl", "samples.jsonl"
LARGEST, LONGEST_LINE = 2**36, 2**20  # bytes; a row has a few thousand


def trim_all(folder: Path, step: int) -> None:
    """Remove the rows that a run will write again from this step on."""
    for name in (NAME, SAMPLES):
        trim_rows(folder / name, step)


def trim_rows(path: Path, step: int) -> None:
    """Remove the rows after the checkpoint that a run resumes from: the run will write them again."""
    if not path.exists():
        return
    kept = [row for row in rows_in(path) if row["step"] <= step]
    write_durably(path, "".join(f"{json.dumps(row)}\n" for row in kept))


def rows_in(path: Path) -> Iterator[dict]:
    """The rows that can be read. A line may be cut off because the machine stopped, or damaged by the disk."""
    for line in lines_in(path):
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if fits(row, {"step": int}):
                yield row


def lines_in(path: Path) -> Iterator[bytes]:
    """The lines of the file. Only one line at a time is in memory, because the file may come from a stranger."""
    with as_sentence(path), os.fdopen(open_file(path), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST:
            raise UserError(f"{path} must have at most {LARGEST:,} bytes to be read, but has {size:,}; move it away")
        yield from iter(lambda: file.readline(LONGEST_LINE), b"")


def rows_at(path: Path, step: int) -> set[tuple]:
    """The rows of the step from which a run resumes, as keys. The run measures some of these rows again."""
    rows = rows_in(path) if path.exists() else ()
    return {(step, *list(row)[2:]) for row in rows if row["step"] == step}


def last_row(path: Path) -> int:
    with files_at(path):
        return max((row["step"] for row in rows_in(path)), default=0) if path.is_file() else 0
