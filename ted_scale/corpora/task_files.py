"""The data sets' own files, as their authors hand them out: GLUE's .tsv and SQuAD's .json.

Note: GLUE's files name columns and labels in another way than the tables on the hub. Here each row gets the hub's names, which the
templates ask for. CoLA's file has no line of names.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import parse_json

COLUMNS = {
    "mrpc": {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
    "qqp": {"is_duplicate": "label"},
    "mnli": {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
}
WITHOUT_NAMES = {"cola": ["source", "label", "star", "sentence"]}
LABELS = {"entailment": 0, "not_entailment": 1, "neutral": 1, "contradiction": 2}  # the others are digits


def is_own(path: Path, name: str) -> bool:
    return path.suffix == (".json" if name == "squad" else ".tsv")


def rows_of(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """(where it is, row as on the hub)"""
    try:
        yield from questions(path) if path.suffix == ".json" else lines(path, name)
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must be as {name}'s authors wrote it, but is not ({type(error).__name__}: {error}); give JSON lines, "
            "Parquet or Arrow with the columns of docs/tasks.md"
        ) from None


def lines(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """Without quotes: a quotation mark is text in these files. A line of another length is no row, as some of QQP's are."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = WITHOUT_NAMES.get(name) or next(table, [])
        names = [COLUMNS.get(name, {}).get(column, column) for column in names]
        for number, fields in enumerate(table, 1 if name in WITHOUT_NAMES else 2):
            if len(fields) == len(names):
                row = dict(zip(names, fields, strict=True))
                yield f"{path}:{number}", {**row, **({"label": label_of(row["label"])} if "label" in row else {})}


def label_of(text: str) -> int | str:
    return LABELS[text] if text in LABELS else int(text) if text.lstrip("-").isdigit() else text


def questions(path: Path) -> Iterator[tuple[str, dict]]:
    """SQuAD's articles hold paragraphs, and these hold questions."""
    data = parse_json(path.read_text(encoding="utf-8-sig"))
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = {"text": [answer["text"] for answer in asked["answers"]]}
                row = {"context": paragraph["context"], "question": asked["question"], "answers": answers}
                yield f"{path} (question {asked.get('id', '?')})", row
