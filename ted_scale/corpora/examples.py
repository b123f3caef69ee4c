"""Conversations and prompts with completions as documents whose tokens are targets or not.

`ted-scale tokenize --targets` reads them. A record is rendered whole and encoded whole, many at a time, and the offsets of
the tokens say which of them hold a character of an answer. Note: a token across the border of an answer therefore counts, and
no text is encoded in pieces, which would give other tokens than the model will see.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ted_scale.base.errors import UserError, files_at
from ted_scale.corpora.marks import Marked, Sizes, encode_marked, sizes_of
from ted_scale.corpora.messages import list_of, object_in, refuse_dropped, said_in, tools_of
from ted_scale.corpora.templates import Span, Template, answer, answers, weighs, writes_unasked
from ted_scale.corpora.tokenizer import hugging_face
from ted_scale.corpora.writer import Encoded
from ted_scale.storage import hub


class Example(NamedTuple):
    text: str
    spans: list[Span]  # the targets
    plain: bool  # no template wrote it: the end-of-document token follows


class Reader(NamedTuple):
    """What a worker needs; it pickles."""

    targets: str
    template: Template
    backend: Any  # of the Hugging Face tokenizer, without a post-processor: one may trim offsets
    eod: tuple[int, str]
    special: str  # matches the special tokens in a text; "" where they may be spelled out
    sizes: Sizes | None  # of its tokens


def open_reader(path: str, targets: str, template: Path | None, parse_special: bool) -> Reader:
    """A fast tokenizer with its chat template, for `targets` as --targets has them. A UserError where it is neither."""
    if str(path).endswith(".model"):
        raise UserError(
            f"--tokenizer {path} must be a fast Hugging Face tokenizer where --targets is given, but is a sentencepiece model; "
            "name a folder with a tokenizer.json"
        )
    folder = hub.find_folder("--tokenizer", str(path), hub.TOKENIZER)
    model, _ = hugging_face(folder, f"--tokenizer {path} must be a Hugging Face tokenizer where --targets is given")
    if not model.is_fast:
        raise UserError(
            f"--tokenizer {path} must be a fast one where --targets is given, but is not; save its tokenizer.json"
        )
    special = sorted((t.content for t in model.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    backend = model.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    written = Template(template_text(model, template), model.special_tokens_map, date.today())
    return Reader(
        targets, written._replace(unasked=writes_unasked(written)), backend,
        (model.eos_token_id, model.eos_token), "" if parse_special else "|".join(map(re.escape, special)), sizes_of(backend),
    )  # fmt: skip


def template_text(model, file: Path | None) -> str:
    """The template of the command line, or the tokenizer's own; "" where there is none."""
    if file:
        with files_at(file):
            hub.check_text(f"--chat-template {file} must be a template", file)
            return file.read_text(encoding="utf-8")
    own = model.chat_template
    return (own.get("default", "") if isinstance(own, dict) else own) or ""


def describe(reader: Reader) -> dict:
    """What of the template decides the bytes of an output. One that asks for the day makes others on another day."""
    day = {"day": str(reader.template.day)} if reader.template.asks_for_day else {}
    return {"template_sha256": hashlib.sha256(reader.template.text.encode()).hexdigest(), **day}


def encode_examples(reader: Reader, dtype: numpy.dtype, records: list[str]) -> Encoded:
    """The records that can be learned from as documents, and why the others cannot."""
    examples, refused = {}, {}
    for number, record in enumerate(records):
        try:
            example = example_of(reader, record)
            example.text.encode()
            examples[number] = example
        except UnicodeEncodeError:
            refused[number] = "must be text, but spells half of a surrogate pair; correct it or pass --on-error skip"
        except ValueError as error:
            refused[number] = str(error)
    documents = encoded(reader, examples)
    for number in [number for number, (_, marks) in documents.items() if b"\1" not in marks.tobytes()]:
        del documents[number]
        refused[number] = "must have an answer of a token or more, but has none; leave it out"
    kept = [documents[number] for number in sorted(documents)]
    lengths = numpy.fromiter((len(ids) for ids, _ in kept), numpy.int64, len(kept))
    ids = numpy.concatenate([numpy.zeros(0, dtype), *(ids for ids, _ in kept)], dtype=dtype, casting="unsafe")
    targets = numpy.concatenate([numpy.zeros(0, numpy.int8), *(marks for _, marks in kept)])
    return Encoded(ids, lengths, targets, tuple(sorted(refused.items())))


def encoded(reader: Reader, examples: dict[int, Example]) -> dict[int, Marked]:
    """(ids, 1 for each that is a target) of each example. What a template writes has special tokens, plain text has none."""
    found = {}
    for plain in (True, False):
        some = {number: example for number, example in examples.items() if example.plain == plain}
        reader.backend.encode_special_tokens = plain and bool(reader.special)
        texts, spans = [e.text for e in some.values()], [e.spans for e in some.values()]
        for number, one in zip(some, encode_marked(reader.backend, reader.sizes, texts, spans), strict=True):
            found[number] = (numpy.append(one[0], reader.eod[0]), numpy.append(one[1], numpy.int8(1))) if plain else one
    return found


def example_of(reader: Reader, record: str) -> Example:
    """What a line or row holds. A ValueError has the rest of a sentence."""
    values = object_in(record)
    if reader.targets == "completion":
        return completion_of(reader, values)
    messages = messages_of(reader, values, "messages")
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"must be a conversation that ends with a turn of the assistant, but ends with one of {messages[-1]['role']}; leave "
            "out what follows the last answer, or pass --on-error skip"
        )
    text, spans = answers(reader.template, messages, tools_of(values), reader.targets == "last")
    return Example(text, spans, False)


def completion_of(reader: Reader, values: dict) -> Example:
    """Of text, which becomes one text, or of messages, which become one conversation."""
    prompt, completion = values.get("prompt"), values.get("completion")
    if absent := [key for key in ("prompt", "completion") if values.get(key) is None]:
        raise ValueError(
            f"must have a prompt and a completion, but has no {absent[0]}; add it, or pass --on-error skip"
        )
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(
            'must have texts or messages in both "prompt" and "completion", but mixes them; correct it, or pass --on-error skip'
        )
    if not isinstance(prompt, str):
        return turns_of(reader, values)
    completion = completion.removesuffix(reader.eod[1])
    if not completion.strip():
        raise ValueError(
            "must have a completion with text, but has an empty one; leave it out, or pass --on-error skip"
        )
    return Example(prompt + completion, [(len(prompt), len(prompt + completion))], True)


def turns_of(reader: Reader, values: dict) -> Example:
    """A prompt and a completion of messages. All of the completion counts, so it may have no turn of anybody else."""
    before, after = messages_of(reader, values, "prompt"), messages_of(reader, values, "completion")
    if other := next((message["role"] for message in after if message["role"] != "assistant"), ""):
        raise ValueError(
            f'must have turns of the assistant alone in "completion", but has one of {other}; move what comes before the last '
            "answer into the prompt, or pass --on-error skip"
        )
    if not all(map(weighs, after)):
        raise ValueError(
            'must have answers that count in "completion", but one has "weight": 0; move it into the prompt, or pass '
            "--on-error skip"
        )
    messages, tools = before + after, tools_of(values)
    text = reader.template.render(messages, tools)
    span = answer(reader.template, messages, tools, len(before), text, len(after))
    refuse_dropped(reader.template.text, reader.template.render, text, messages, tools)
    return Example(text, [span], False)


def messages_of(reader: Reader, values: dict, key: str) -> list[dict]:
    """Messages that a template can write; each of the assistant's says something."""
    if not reader.template.text:
        raise ValueError(
            "must be read with a chat template, but the tokenizer has none; give one by --chat-template FILE"
        )
    messages = list_of(values, key)
    for number, message in enumerate(messages, 1):
        texts = said_in(message)
        if message["role"] == "assistant" and not any(text.strip() for text in texts) and not message.get("tool_calls"):
            raise ValueError(
                f'must have an answer with text in every turn of the assistant, but message {number} of "{key}" is empty; leave it '
                "out, or pass --on-error skip"
            )
        if reader.special and (found := next(filter(None, (re.search(reader.special, text) for text in texts)), None)):
            raise ValueError(
                f'must have special tokens from the chat template alone, but message {number} of "{key}" spells out {found[0]}; '
                "correct it, or pass --parse-special to take it as the token"
            )
    return messages


def accepted(groups: Iterator, files: list[Path], on_error: Callable, late: list[int]) -> Iterator[tuple]:
    """(batch, encoded) without what cannot be learned from, which goes to `on_error`. `late` holds how many there were: a worker
    finds them after the reader, which reads ahead, has counted what it left out itself."""
    for group, found in groups:
        refused, marks = dict(found.refused), []
        for number, mark in enumerate(group.marks):
            if number in refused:
                on_error(UserError(f"{files[mark.file]}:{mark.line} {refused[number]}"))
                late[0] += 1
            else:
                marks.append(mark._replace(skipped=mark.skipped + late[0]))
        yield group._replace(marks=marks), found
