"""Corpora with targets made by the command, and what they hold."""

import itertools

from ted_scale.commands import tokenize_corpus
from ted_scale.corpora.local import expand
from ted_scale.corpora.reader import Shard
from ted_scale.corpora.shards import document_borders, read_index


def tokenize(folder, out, *rest):
    tokenize_corpus.main(["--tokenizer", str(folder), "--out", str(out), *map(str, rest)])
    return out


def documents_of(out):
    """(ids, targets) of every document."""
    found = []
    for prefix in expand(out):
        index = read_index(prefix)
        shard, borders = Shard(index), document_borders(index).tolist()
        for begin, end in itertools.pairwise(borders):
            marks = shard.targets(begin, end)
            found.append((shard.tokens(begin, end).tolist(), marks.tolist()))
    return found


def targets_as_text(folder, document):
    """The text with what counts in brackets."""
    from transformers import AutoTokenizer

    model, text, at = AutoTokenizer.from_pretrained(folder), "", 0
    ids, marks = document
    for end in range(1, len(ids) + 1):
        if end == len(ids) or marks[end] != marks[at]:
            words = model.decode(ids[at:end])
            text += f"[{words}]" if marks[at] else words
            at = end
    return text
