"""Conversations to targets beside the tokenizer alone: python tools/bench/templates.py --tokenizer FOLDER [--turns 2]

The rate of what a worker of tokenize_corpus.py does with seeded conversations (parse, render, encode, mask), and that of one
encode_batch_fast of the tokenizers library over the rendered texts, in one process, in turns, with one thread, by processor
time. The median of the ratios is what counts. --template replaces the tokenizer's own.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a worker
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

import numpy

from ted_scale.base.exits import run_main
from ted_scale.corpora.examples import encode_examples, example_of, open_reader
from tools.bench.tokenization import alone_seconds

BATCH = 256


def conversations(words: list[str], number: int, turns: int, length: int) -> list[str]:
    rng = random.Random(0)

    def said() -> str:
        return " ".join(rng.choices(words, k=max(1, round(rng.lognormvariate(0, 0.8) * length))))

    roles = [role for _ in range(turns) for role in ("user", "assistant")]
    return [json.dumps({"messages": [{"role": role, "content": said()} for role in roles]}) for _ in range(number)]


def ours(reader, records: list[str]) -> tuple[float, int]:
    """(processor seconds, tokens) of all that a worker does."""
    began, tokens = time.process_time(), 0
    for first in range(0, len(records), BATCH):
        tokens += len(encode_examples(reader, numpy.dtype("int32"), records[first : first + BATCH]).ids)
    return time.process_time() - began, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="The rate of templates and masks beside the tokenizer's own.")
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json")
    parser.add_argument("--template", type=Path, help="default: the tokenizer's own")
    parser.add_argument("--targets", choices=("assistant", "last"), default="assistant")
    parser.add_argument("--turns", type=int, default=2, help="answers in a conversation")
    parser.add_argument("--words", type=int, default=120, help="of a message, in the median")
    parser.add_argument("--number", type=int, default=1024, help="conversations")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    words = " ".join(path.read_text() for path in Path(__file__).parents[2].glob("docs/*.md")).split()
    records = conversations(words, arguments.number, arguments.turns, arguments.words)
    times: list[tuple[float, float]] = []
    for _ in range(arguments.repeats):
        reader = open_reader(arguments.tokenizer, arguments.targets, arguments.template, True)
        spent, tokens = ours(reader, records)
        texts = [example_of(reader, record).text for record in records]
        times.append((spent, alone_seconds(arguments.tokenizer, texts, time.process_time)))
        print(f"templates and masks {tokens / spent:,.0f} tokens/s, alone {tokens / times[-1][1]:,.0f}", flush=True)
    ratio = statistics.median(other / own for own, other in times)
    print(f"{len(records):,} conversations, {tokens:,} tokens; rate of templates and masks / alone: {ratio:.2f}")


if __name__ == "__main__":
    run_main(main)
