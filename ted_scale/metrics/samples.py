"""samples.jsonl: the text that the student writes after each prompt during training, beside the teacher's text.

The teacher is frozen, so it writes once for each prompt. Later rows repeat its text. A resume reads this text from the file.
Note: existing rows are not written again, so a resume may ask for the rows of its own step.
"""

import json
from functools import partial
from pathlib import Path

from ted_scale.base.beneath import append_to
from ted_scale.base.errors import Preempted, UserError
from ted_scale.base.parsing import fits
from ted_scale.evaluation import greedy, prompts
from ted_scale.metrics.console import log_line
from ted_scale.metrics.rows import SAMPLES, rows_in
from ted_scale.metrics.wandb_tables import add_samples
from ted_scale.ranks.agree import of_rank_0


def write(plan, teacher, metrics, held_out, student, progress) -> bool:
    """Write the rows of this step. Returns whether a signal asks to stop. Then no rows are written, and the next start writes
    them."""
    path, step = plan.run.folder / SAMPLES, progress.step
    there, of_teacher = of_rank_0(known, path, step)
    asked = [prompt for prompt in prompts.all_of(plan, held_out) if prompt.text not in there]
    if not asked:
        return False
    try:
        with metrics.aside("samples"):
            texts = of_student(plan, student, asked)
            new = [prompt for prompt in asked if plan.teacher and prompt.text not in of_teacher]
            of_teacher |= texts_of(plan, teacher.logits, new, student.device) if new else {}
    except Preempted:
        return True
    rows = [{"step": step, "prompt": text, "student": texts[text]} for text, _ in asked]
    rows = [row | ({"teacher": of_teacher[row["prompt"]]} if plan.teacher else {}) for row in rows]
    if metrics.writes:
        keep(path, rows)
        metrics.call_wandb(partial(add_samples, path, step))
    return False


def known(path: Path, step: int) -> tuple[set[str], dict[str, str]]:
    """(the prompts of this step, the teacher's text for each prompt), read from the file. An unreadable file never stops a run."""
    try:
        rows = [row for row in rows_in(path) if fits(row, {"prompt": str})] if path.exists() else []
    except (OSError, UserError) as error:
        log_line(f"{path} must be readable, but is not ({why(error)}): samples of step {step} are written anew")
        rows = []
    there = {row["prompt"] for row in rows if row["step"] == step}
    return there, {row["prompt"]: row["teacher"] for row in rows if isinstance(row.get("teacher"), str)}


def of_student(plan, student, asked: list[prompts.Prompt]) -> dict[str, str]:
    student.eval()
    try:
        return texts_of(plan, lambda batch, at: student(batch, None, None, None, at=at), asked, student.device)
    finally:
        student.train()


def texts_of(plan, logits, asked: list[prompts.Prompt], device) -> dict[str, str]:
    """The text that a model writes after each prompt."""
    tokenizer = prompts.tokenizer_of(plan)
    vocabulary, starts = min(plan.vocabulary, len(tokenizer.pieces)), [prompt.ids for prompt in asked]
    found = greedy.written(logits, starts, plan.run.samples.tokens, vocabulary, device)
    return {
        prompt.text: tokenizer.decode(greedy.until(ids, tokenizer.eod))
        for prompt, ids in zip(asked, found, strict=True)
    }


def keep(path: Path, rows: list[dict]) -> None:
    """Append the rows. On a full disk or in a strange file they are lost. This never stops the run: only this rank would end, and
    the others would wait."""
    try:
        with append_to(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        log_line(f"{len(rows)} samples of step {rows[0]['step']} are in {path}")
    except (OSError, UserError) as error:
        log_line(f"{path} must be writable, but is not ({why(error)}): samples of step {rows[0]['step']} are lost")


def why(error: OSError | UserError) -> str:
    return getattr(error, "strerror", None) or str(error)
