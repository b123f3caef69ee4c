"""What Weights & Biases gets besides plain numbers: a row's layer losses as a heat-map, the samples of text, the report's page.

Each function is an action of wandb_connection.py's thread. Note: if a histogram is logged repeatedly, W&B draws it as a picture
over time. So a row's heat-map is one histogram with a bin for each pair. The "count" of a bin is the pair's loss, so a row has
only a few numbers.
"""

import math
from pathlib import Path

from ted_scale.base import redact
from ted_scale.metrics.console import log_line
from ted_scale.metrics.rows import rows_in
from ted_scale.metrics.wandb_connection import said

HEAT_MAP, SAMPLES, REPORT = "layers/heat_map", "samples/text", "report"
PAIR = "loss/layer/"
UNIT = 1_000_000  # W&B counts in whole numbers, so a loss is counted in millionths
COLUMNS = ("step", "prompt", "student", "teacher")
MOST_SAMPLES = 1000  # every update sends the whole table; the file has all rows


def add_row(row: dict[str, float], wandb_run) -> None:
    wandb_run.log(row | heat_map(row))


def heat_map(row: dict[str, float]) -> dict:
    """The heat-map of a row's layer losses, if it has any and all are finite."""
    losses = [row[key] for key in sorted(filter(is_pair, row), key=pair_of)]
    if not losses or not all(map(math.isfinite, losses)):
        return {}
    import numpy as np
    import wandb

    counts = [round(UNIT * loss) for loss in losses]
    return {HEAT_MAP: wandb.Histogram(np_histogram=(np.array(counts), np.arange(len(counts) + 1)))}


def is_pair(key: str) -> bool:
    return key.startswith(PAIR) and key.removeprefix(PAIR).isdecimal()


def pair_of(key: str) -> int:
    return int(key.removeprefix(PAIR))


def add_samples(path: Path, step: int, wandb_run) -> None:
    """Send the newest MOST_SAMPLES samples of the file. A table uses the network at once, unlike a row. If it fails, the rows
    after it must not be lost."""
    try:
        log_samples(path, step, wandb_run)
    except Exception as error:
        log_line(f"W&B does not get the samples of step {step} ({said(error)}); {path} has them")


def log_samples(path: Path, step: int, wandb_run) -> None:
    import wandb

    rows = list(rows_in(path))[-MOST_SAMPLES:]
    texts = [[row["step"], *(redact.redact(str(row.get(key, ""))) for key in COLUMNS[1:])] for row in rows]
    wandb_run.log({"step": step, SAMPLES: wandb.Table(columns=list(COLUMNS), data=texts)})


def add_page(page: Path, step: int, wandb_run) -> None:
    """Send the report's page. It is self-contained, so W&B need not add its own style."""
    import wandb

    wandb_run.log({"step": step, REPORT: wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
