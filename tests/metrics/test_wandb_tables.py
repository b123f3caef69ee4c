"""Tables as W&B stores them, read back from its files."""

import json

import pytest
from tiny import make_run
from wandb_file import read_records, read_rows

from ted_scale.metrics.tracking import open_wandb
from ted_scale.metrics.wandb_tables import add_samples

TEXTS = [
    {"step": step, "prompt": "Größe", "student": f"text {step}", **({"teacher": "better"} if step else {})}
    for step in (0, 10, 20)
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(the rows that W&B keeps, the tables beside them)"""
    run = make_run(tmp_path_factory.mktemp("tables"), wandb={"project": "p", "mode": "offline"})
    wandb_run = open_wandb(run, None)
    wandb_run.tell(lambda opened: add_samples(TEXTS, 10, opened))
    wandb_run.close()
    (file,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    return read_rows(list(read_records(file))), file.parent / "files"


def table(kept, key: str) -> dict:
    rows, files = kept
    (shown,) = [row[key] for row in rows if key in row]
    return json.loads((files / shown["path"]).read_text(encoding="utf-8"))


def test_the_samples_of_all_steps_so_far_are_one_table(kept):
    found = table(kept, "samples/texts")
    assert found["columns"] == ["step", "tokens", "prompt", "student", "teacher"]
    assert found["data"] == [
        [0, None, "Größe", "text 0", None],
        [10, None, "Größe", "text 10", "better"],
    ]
