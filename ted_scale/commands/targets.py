"""What inspect_corpus shows of targets: the share of tokens that count, and documents with these in colour.

Note: where the output is no terminal, or NO_COLOR is set, brackets stand for the colour.
"""

import os
import sys
from itertools import groupby

import numpy

from ted_scale.base.errors import UserError
from ted_scale.base.redact import printable
from ted_scale.corpora.reader import Shard, reading
from ted_scale.corpora.shards import ShardIndex
from ted_scale.corpora.tokenizer import Tokenizer

CHUNK = 1 << 24  # tokens looked up at once
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def count(index: ShardIndex) -> int:
    """The tokens of a shard that count."""
    borders = range(0, index.tokens, CHUNK)
    return sum(int(reading(index, Shard.targets, low, min(low + CHUNK, index.tokens)).sum()) for low in borders)


def share_of(masked: list[ShardIndex], tokens: int) -> str:
    """Of a corpus of `tokens` tokens, some shards of which have targets; in the others every token counts."""
    counted = tokens + sum(count(index) - index.tokens for index in masked)
    return f"{counted:,} tokens are targets, {counted / tokens:.1%} of all"


def check(index: ShardIndex, sidecar: dict) -> None:
    if index.has_targets and "targets" in sidecar and sidecar["targets"] != (found := count(index)):
        raise UserError(
            f"corpus file {index.prefix}.idx must have the {sidecar['targets']} targets that its .json counts, but has {found}; "
            "copy it again"
        )


def first_shown(marks: numpy.ndarray, most: int) -> int:
    """The first token to show. It stands `most // 8` tokens before the first target, which is about half of the characters that
    are shown."""
    return max(0, int(marks.argmax()) - most // 8)


def as_text(tokenizer: Tokenizer, ids: list[int], marks: numpy.ndarray, most: int, before: bool) -> str:
    """The beginning of these tokens, with what counts in colour. `before`: some of the document are before them."""
    begin, end = (GREEN, PLAIN) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("[", "]")
    text, shown, at = "… " * before, 0, 0
    for counts, run in groupby(marks.tolist()):
        length = len(list(run))
        words = tokenizer.decode(ids[at : at + min(length, 4 * most)])
        words = printable(words[: most - shown] + " …" * (len(words) > most - shown), "\n")
        text, shown, at = text + (f"{begin}{words}{end}" if counts else words), shown + len(words), at + length
        if shown >= most:
            break
    return "\n".join(f"    {line}" for line in text.splitlines())
