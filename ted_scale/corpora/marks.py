"""Which tokens of a text hold a character of an answer.

A token of a byte-level vocabulary stands for a known number of bytes, so the sums of these numbers are the borders of tokens. Note:
the backend's own offsets say the same, but slow the encoding; they are asked where the sums are not those of the text.
"""

import json
from bisect import bisect_left, bisect_right
from itertools import chain
from typing import Any, NamedTuple

import numpy

from ted_scale.corpora.templates import Span

Marked = tuple[numpy.ndarray, numpy.ndarray]  # ids, and 1 for each that counts


class Sizes(NamedTuple):
    bytes_of: numpy.ndarray  # of each id
    ascii_alone: bool  # a normalizer may change other texts


def sizes_of(backend: Any) -> Sizes | None:
    """None where tokens do not stand for bytes, or not for those of the text."""
    from tokenizers import models, normalizers, pre_tokenizers

    model, normalizer, last = backend.model, backend.normalizer, last_splitter(backend.pre_tokenizer)
    alphabet, pieces = pre_tokenizers.ByteLevel.alphabet(), backend.get_vocab(with_added_tokens=False)
    is_byte_level = isinstance(model, models.BPE) and not (
        model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback
    )
    if not is_byte_level or last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    leaves_none_out = pieces.keys() >= set(alphabet)  # else a byte without a piece is left out, which the sum shows
    if not (leaves_none_out or model.unk_token is None) or not isinstance(normalizer, normalizers.NFC | None):
        return None
    added = {number: len(token.content.encode()) for number, token in backend.get_added_tokens_decoder().items()}
    found = numpy.zeros(1 + max(*pieces.values(), *added), numpy.int64)
    for number, size in chain(((number, len(piece)) for piece, number in pieces.items()), added.items()):
        found[number] = size
    return Sizes(found, normalizer is not None)


def last_splitter(splitter: Any) -> dict:
    """Its settings; the last one's where there are several."""
    settings = json.loads(splitter.__getstate__()) if splitter else {}
    return settings["pretokenizers"][-1] if settings.get("type") == "Sequence" else settings


def encode_marked(backend: Any, sizes: Sizes | None, texts: list[str], spans: list[list[Span]]) -> list[Marked]:
    """(ids, marks) of each text."""
    summed = by_sizes(backend, sizes, texts, spans) if sizes and texts else [None] * len(texts)
    rest = [number for number, one in enumerate(summed) if one is None]
    encodings = iter(backend.encode_batch([texts[number] for number in rest], add_special_tokens=False))
    each = zip(summed, texts, spans, strict=True)
    return [one or by_offsets(next(encodings), text, some) for one, text, some in each]


def by_sizes(backend: Any, sizes: Sizes, texts: list[str], spans: list[list[Span]]) -> list[Marked | None]:
    """None where the tokens do not have as many bytes as the text: something was left out or changed."""
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    stops = numpy.cumsum([len(encoding) for encoding in encodings]).tolist()
    ids = numpy.fromiter(chain.from_iterable(e.ids for e in encodings), numpy.int64, stops[-1])
    ends = numpy.cumsum(sizes.bytes_of[ids])
    marks, found = numpy.zeros(len(ids), numpy.int8), []
    for text, some, start, stop in zip(texts, spans, [0, *stops], stops, strict=False):
        plain, own = text.isascii(), ends[start:stop]
        base = int(ends[start - 1]) if start else 0
        sound = len(own) and int(own[-1]) - base == (len(text) if plain else len(text.encode()))
        if not sound or (sizes.ascii_alone and not plain):
            found.append(None)
            continue
        borders = [base + (at if plain else len(text[:at].encode())) for span in some for at in span]
        first = own.searchsorted(borders[::2], "right").tolist()
        last = own.searchsorted(borders[1::2]).tolist()
        for low, high in zip(first, last, strict=True):
            marks[start + low : start + high + 1] = 1
        found.append((ids[start:stop], marks[start:stop]))
    return found


def by_offsets(encoding: Any, text: str, spans: list[Span]) -> Marked:
    """The backend is asked for a few tokens, because a list of all offsets costs a tenth of the encoding. It is made where a border
    is in no token, as behind spaces that were stripped."""
    marks = numpy.zeros(len(encoding.ids), numpy.int8)
    for begin, end in spans:
        first = encoding.char_to_token(begin)
        stop = len(marks) if end == len(text) else encoding.char_to_token(end)
        if first is None or stop is None:
            first = bisect_right(encoding.offsets, begin, key=lambda offset: offset[1])
            stop = bisect_left(encoding.offsets, end, key=lambda offset: offset[0])
        while stop < len(marks) and encoding.token_to_chars(stop)[0] < end:
            stop += 1
        marks[first:stop] = 1
    return numpy.array(encoding.ids, numpy.int64), marks
