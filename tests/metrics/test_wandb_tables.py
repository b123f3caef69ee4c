"""Tables as W&B stores them, read back from its files."""

import json

import pytest
from tiny import make_run
from wandb_file import finished, read_rows

from ted_scale.metrics.wandb_connection import open_wandb
from ted_scale.metrics.wandb_tables import add_samples

TEXTS = [
    {"step": step, "prompt": "Größe", "student": f"text {step}", **({"teacher": "better"} if step else {})}
    for step in (0, 10)
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(the rows that W&B keeps, the folder of the tables)"""
    run = make_run(tmp_path_factory.mktemp("tables"), wandb={"project": "p", "mode": "offline"})
    run.folder.mkdir(parents=True)
    samples = run.folder / "samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    wandb_run = open_wandb(run, None)
    wandb_run.tell(lambda opened: add_samples(samples, 10, opened))
    wandb_run.close()
    (file,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    return read_rows(finished(file)), file.parent / "files"


def test_the_samples_of_all_steps_so_far_are_one_table(kept):
    rows, files = kept
    (path,) = [row["samples/text/path"] for row in rows if "samples/text/path" in row]
    table = json.loads((files / path).read_text(encoding="utf-8"))
    assert table["columns"] == ["step", "prompt", "student", "teacher"]
    assert table["data"] == [[0, "Größe", "text 0", ""], [10, "Größe", "text 10", "better"]]
