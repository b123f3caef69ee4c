"""Scores of models side by side: a table, JSON and Weights & Biases."""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.durable import write_durably
from ted_scale.evaluation.scores import Score
from ted_scale.metrics.wandb_connection import ATTEMPT_S, has_key, said, start_service


class Result(NamedTuple):
    """What one model has."""

    model: str  # its name in the table
    path: str
    scores: list[Score]


def table(results: list[Result]) -> str:
    """Markdown: a row a score, a column a model."""
    rows = list(dict.fromkeys((score.what, score.metric) for result in results for score in result.scores))
    columns = [{(s.what, s.metric): s.shown for s in result.scores} for result in results]
    head = ["", "", *(result.model for result in results)]
    lines = [head, ["---", "---", *["---:"] * len(results)]]
    lines += [[*row, *(column.get(row, "-") for column in columns)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_json(path: Path, results: list[Result], settings: dict) -> None:
    models = [{"model": r.model, "path": r.path, "scores": [score._asdict() for score in r.scores]} for r in results]
    write_durably(path, json.dumps({"settings": settings, "models": models}, indent=1) + "\n")


def track(project: str, result: Result, settings: dict) -> None:
    """A W&B run for each model: online if there is a key and W&B answers, else offline."""
    import wandb  # takes a second that a mistake should not wait for

    start_service()
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    try:
        log_to(project, result, settings, mode)
    except Exception as error:  # W&B raises many kinds
        if mode != "online":
            raise
        print(f"W&B is offline for {result.model}, because it could not be reached ({said(error)})", file=sys.stderr)
        wandb.teardown(1)  # or W&B refuses the next try
        log_to(project, result, settings, "offline")


def log_to(project: str, result: Result, settings: dict, mode) -> None:
    import wandb

    with wandb.init(
        project=project, name=result.model, config={**settings, "model": result.path}, mode=mode, job_type="evaluation",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=ATTEMPT_S),
    ) as run:  # fmt: skip
        run.log({score.key: score.value for score in result.scores})


def names(paths: list[str]) -> list[str]:
    """The last part of each path; with more of them where two end alike."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len({*short}) == len({*paths}):
            return short
    return paths
