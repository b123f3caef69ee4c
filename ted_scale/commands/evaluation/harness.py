"""lm-eval on one model: its tasks in, scores out. Prompts, metrics and standard errors are lm-eval's own."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from ted_scale.evaluation.scores import Score, scores
from ted_scale.evaluation.suites import Asked


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
