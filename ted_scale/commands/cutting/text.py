"""The text on which a cut is chosen, and other text of the same corpora on which the student is judged."""

import argparse
import math
import re
from collections.abc import Iterator

import torch

from ted_scale.base.errors import UserError
from ted_scale.commands.evaluation.text import nats_of, refuse_long_windows, tokenizer_in
from ted_scale.config.data import Data
from ted_scale.corpora.shards import tokenizer_of
from ted_scale.corpora.tokenizer import digest
from ted_scale.data.stream import Batch, Stream, batch, open_stream
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.vocabulary import has_tokenizer


def open_text(arguments: argparse.Namespace, teacher: Anatomy) -> Stream | None:
    """The training stream of the corpora, with what they hold out: random windows in an order that never changes."""
    if not arguments.text:
        return None
    if not 0 < arguments.held_out < 1:
        raise UserError(f"--held-out must be above 0 and below 1, but is {arguments.held_out}")
    for name in ("seq_len", "tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, but is {getattr(arguments, name)}")
    corpora = [{"path": path, "name": path, "validation": arguments.held_out} for path in dict.fromkeys(arguments.text)]
    data = Data.model_validate({"corpora": corpora, "seq_len": arguments.seq_len})
    refuse_long_windows(teacher, data)
    try:
        stream = open_stream(data, 0, teacher.vocab_size)
    except UserError as error:
        raise UserError(renamed(str(error))) from None
    refuse_other_tokenizer(stream, teacher)
    return stream


def renamed(sentence: str) -> str:
    """With the words of this command line for those of a run file."""
    sentence = re.sub(r"data\.corpora\[\d+\]", "--text", sentence)
    return sentence.replace("data.seq_len", "--seq-len").replace("data.corpora.validation", "--held-out")


def refuse_other_tokenizer(stream: Stream, teacher: Anatomy) -> None:
    """Shards of other tools name no tokenizer: of them only the range of the ids is known."""
    written = tokenizer_of("--text", [index for part in stream.parts.values() for index in part.shards])
    if written and has_tokenizer(teacher.folder) and digest(tokenizer_in(teacher.folder)) != written[1]:
        raise UserError(
            f"--text must be written with the teacher's tokenizer, but {written[0]} is written with another than the one in "
            f"{teacher.folder}; tokenize it again with --tokenizer {teacher.folder}"
        )


def batches(stream: Stream, tokens: int, size: int, device) -> Iterator[Batch]:
    """The first `tokens` of the training stream, rounded up to windows."""
    windows = math.ceil(tokens / stream.seq_len)
    for first in range(0, windows, size):
        positions = list(range(first, min(first + size, windows)))
        yield batch(stream, positions).moved(lambda t: t.to(device))


@torch.no_grad()
def held_out_loss(model, stream: Stream, tokens: int, size: int, device) -> float:
    """The mean over what the corpora hold out, at most so many tokens of each."""
    nats, count = 0.0, 0
    for held_out in stream.held_out.values():
        windows = min(held_out.count, math.ceil(tokens / stream.seq_len))
        found = nats_of(model, held_out, windows, size, device)
        nats, count = nats + found[0], count + found[1]
    return nats / count
