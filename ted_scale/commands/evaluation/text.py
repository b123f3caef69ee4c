"""Loss and bits a byte on held-out shards, read window by window as a run reads what it validates on.

Counted is each token that a run counts: not the first of the text, and not the first of a document. The loss is the mean of
their nats. Bits a byte are the sum of their nats, divided by ln 2 and by the bytes of UTF-8 that they decode to, so the same text
in the shards of different tokenizers can be compared. Note: a token that ends a document costs nats and has no bytes.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import torch

from ted_scale.base.errors import UserError
from ted_scale.config.data import Data
from ted_scale.corpora.corpus import Part, open_parts
from ted_scale.corpora.shards import tokenizer_of
from ted_scale.corpora.tokenizer import Tokenizer, digest, load_tokenizer
from ted_scale.data.stream import Stream, held_out_stream, validation_batches
from ted_scale.distill.normalization import count_valid
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.evaluation.scores import Score
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import inspect, read_config
from ted_scale.models.weights import build_network

CUT = "�"  # what a character decodes to whose bytes are not all there


class Reading(NamedTuple):
    """A model, and what it will read of each corpus."""

    anatomy: Anatomy
    tokenizer: Tokenizer
    streams: dict[str, Stream]
    windows: dict[str, int]  # of each stream


class Counted(NamedTuple):
    nats: float
    tokens: int
    bytes: int

    @property
    def scores(self) -> dict[str, float | int]:
        return {
            "loss": self.nats / self.tokens,
            "bits a byte": self.nats / math.log(2) / self.bytes if self.bytes else math.nan,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def plan(folder: Path, tokenizer: Tokenizer, data: Data, most: int | None) -> Reading:
    """Finds what does not fit together before anything is measured. `most` is the tokens to read of each corpus."""
    anatomy = inspect("MODEL", str(folder), is_frozen=True)
    refuse_long_windows(anatomy, data)
    streams = {
        corpus.name: held_out_stream(data, anatomy.vocab_size, part_of(n, data, anatomy.vocab_size), corpus.name)
        for n, corpus in enumerate(data.corpora)
    }
    windows = {name: windows_of(name, stream, most) for name, stream in streams.items()}
    for name, stream in streams.items():
        refuse_other_tokenizer(name, stream, tokenizer, folder)
    return Reading(anatomy, tokenizer, streams, windows)


def part_of(number: int, data: Data, vocab_size: int) -> Part:
    corpus = data.corpora[number]
    whole, held_out = open_parts(number, corpus, vocab_size, data.stream)
    return held_out if corpus.validation else whole


def tokenizer_in(folder: Path) -> Tokenizer:
    try:
        return load_tokenizer(str(folder))
    except UserError as error:
        raise UserError(str(error).replace("--tokenizer", "MODEL", 1)) from None


def refuse_long_windows(anatomy: Anatomy, data: Data) -> None:
    if anatomy.max_length and data.seq_len > anatomy.max_length:
        raise UserError(
            f"--seq-len must be at most the context of {anatomy.folder} ({anatomy.max_length}), but is {data.seq_len}"
        )
    if data.attention == "document" and anatomy.blocks_apart < anatomy.layers:
        raise UserError(
            f"--attention must be causal for {anatomy.folder}, because only {anatomy.blocks_apart} of its {anatomy.layers} "
            "blocks can keep documents apart, but is document"
        )


def windows_of(name: str, stream: Stream, most: int | None) -> int:
    if not stream.count:
        raise UserError(
            f"corpus {name} must hold out --seq-len + 1 = {stream.seq_len + 1} tokens or more, but holds out "
            f"{stream.parts[name].tokens}; lower --seq-len or raise --held-out"
        )
    return min(stream.count, math.ceil(most / stream.seq_len)) if most else stream.count


def refuse_other_tokenizer(name: str, stream: Stream, tokenizer: Tokenizer, folder: Path) -> None:
    """Shards of other tools name no tokenizer: of them only the range of the ids is known."""
    written = tokenizer_of(f"corpus {name}", list(stream.parts[name].shards))
    if written and written[1] != digest(tokenizer):
        raise UserError(
            f"corpus {name} must be written with the tokenizer in {folder}, but {written[0]} is written with another; "
            f"tokenize it again with --tokenizer {folder}, or evaluate that model by itself"
        )


def measure(reading: Reading, dtype: str, micro_batch: int, device: str) -> list[Score]:
    model = loaded(reading.anatomy, dtype, device)
    found = []
    for name, stream in reading.streams.items():
        nats, tokens = nats_of(model, stream, reading.windows[name], micro_batch, device)
        read = reading.windows[name] * stream.seq_len + 1
        size = bytes_of(stream.parts[name], read, reading.tokenizer, stream.vocab_size)
        found += [Score(name, what, value) for what, value in Counted(nats, tokens, size).scores.items()]
    return found


def device_of(asked: str | None) -> str:
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device must be one that torch can use here, but is {device}: {reason}") from None
    return device


def loaded(anatomy: Anatomy, dtype: str, device: str) -> Teacher:
    """A frozen model, as a run has its teacher. "auto" is the dtype that its config names."""
    named = read_config("MODEL", anatomy.folder).dtype if dtype == "auto" else getattr(torch, dtype)
    network = build_network(anatomy, ds_config=None, dtype=named or torch.float32)
    body = TeacherBody(network.to(device), anatomy, []).eval()
    return Teacher(body, body)


def nats_of(model: Teacher, stream: Stream, windows: int, micro_batch: int, device: str) -> tuple[float, int]:
    nats, tokens, one = 0.0, 0, torch.ones((), device=device)
    batches = validation_batches(
        stream, tokens=windows * stream.seq_len, micro_batch=micro_batch, rank=0, world=1, device=device
    )
    for batch in batches:
        nats += float(model.ce(batch, one))
        tokens += int(count_valid([batch]))
    return nats, tokens


def bytes_of(part: Part, count: int, tokenizer: Tokenizer, vocab_size: int) -> int:
    """Of the counted ones among the first `count` tokens. A document's text less that of its first token, because a tokenizer
    may decode a token otherwise where a text begins."""
    borders = sorted({0, *part.begins(0, count).tolist(), count})
    total = 0
    for begin, end in itertools.pairwise(borders):
        ids = part.read(begin, end - begin, vocab_size)[0].tolist()
        total += size(ids, tokenizer) - size(ids[:1], tokenizer)
    return total


def size(ids: list[int], tokenizer: Tokenizer) -> int:
    """A character that is cut is left to the tokens that complete it."""
    text = tokenizer.decode([token for token in ids if token != tokenizer.eod])
    return len(text.rstrip(CUT).encode("utf-8", "surrogatepass"))
