"""lm-eval on one model: its tasks in, scores out. Prompts, metrics and standard errors are lm-eval's own."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from tools.evaluation.results import Score
from tools.evaluation.suites import Asked


def evaluate(folder: Path, index, asked: Asked, *, dtype: str, batch: str, device: str, limit: int | None,
             shots: int | None, run_code: bool) -> list[Score]:  # fmt: skip
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    with contextlib.redirect_stdout(sys.stderr):  # only the table goes to stdout
        found = simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": dtype}, tasks=list(asked.specs),
            task_manager=index, batch_size=batch, device=device, limit=limit, num_fewshot=shots,
            confirm_run_unsafe_code=run_code, log_samples=False,
        )  # fmt: skip
    return scores(found)


def scores(found: dict) -> list[Score]:
    """Of tasks and groups, without the members of a group: the group's own score has them."""
    members = {name for children in found.get("group_subtasks", {}).values() for name in children}
    return [
        score for name, values in found["results"].items() if name not in members for score in scores_of(name, values)
    ]


def scores_of(name: str, values: dict) -> list[Score]:
    """lm-eval's keys are METRIC,FILTER and METRIC_stderr,FILTER; most tasks have no filter."""
    found = []
    for key, value in values.items():
        metric, _, how = key.partition(",")
        if not how or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{how}")
        called = metric if how == "none" else f"{metric} {how}"
        found.append(Score(name, called, float(value), error if isinstance(error, float) else None))
    return found
