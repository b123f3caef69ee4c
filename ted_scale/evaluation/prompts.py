"""The prompts of samples.jsonl: those of the run file, and beginnings of held-out text. All are checked before a run starts.

Nothing is added to a prompt: no token begins a text, because none begins a document of a corpus.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.errors import UserError
from ted_scale.corpora.tokenizer import Tokenizer
from ted_scale.data.stream import Stream
from ted_scale.models.vocabulary import student_tokenizer, tokenizer_folder

BEGINNING = 32  # tokens of a held-out window, or fewer if a row is short


class Prompt(NamedTuple):
    text: str
    ids: list[int]


def check(plan) -> None:
    """Refuse a prompt that cannot be read."""
    if plan.run.samples.every:
        of_run_file(plan, tokenizer_of(plan))


def tokenizer_of(plan) -> Tokenizer:
    """Of the student's folder, or else of the teacher's."""
    return loaded(tokenizer_folder(plan.student, plan.teacher, "samples"))


@functools.cache
def loaded(folder: Path) -> Tokenizer:
    return student_tokenizer(folder)


def all_of(plan, held_out: dict[str, Stream]) -> list[Prompt]:
    """The same on every rank; no text twice."""
    tokenizer = tokenizer_of(plan)
    found = [*of_run_file(plan, tokenizer), *beginnings(plan.run, held_out, tokenizer)]
    return list({prompt.text: prompt for prompt in found}.values())


def of_run_file(plan, tokenizer: Tokenizer) -> list[Prompt]:
    most = plan.run.data.seq_len - plan.run.samples.tokens
    found = []
    for k, text in enumerate(plan.run.samples.prompts):
        must = f"samples.prompts[{k}] must be text that the student's tokenizer reads"
        try:
            (ids,) = tokenizer.encode([text])
        except UserError as error:
            raise UserError(f"{must}, but it is not: {error}") from None
        if not ids:
            raise UserError(f"{must}, but has no token; write some text")
        if max(ids) >= plan.vocabulary:
            raise UserError(f"{must}, but token {max(ids)} is not among the models' {plan.vocabulary}; change the text")
        if len(ids) > most:
            raise UserError(
                f"samples.prompts[{k}] must have at most data.seq_len - samples.tokens = {most} tokens, but has {len(ids)}"
            )
        found.append(Prompt(text, ids))
    return found


def beginnings(run, held_out: dict[str, Stream], tokenizer: Tokenizer) -> list[Prompt]:
    """Of each corpus's first held-out windows, the corpora in turn."""
    wanted, length = run.samples.from_validation, min(BEGINNING, run.data.seq_len - run.samples.tokens)
    most = min(wanted, max((stream.count for stream in held_out.values()), default=0))
    windows = [stream.sample(k) for k in range(most) for stream in held_out.values() if k < stream.count]
    starts = [window.tokens[:length].tolist() for window in windows[:wanted]]
    return [Prompt(tokenizer.decode(ids), ids) for ids in starts]
