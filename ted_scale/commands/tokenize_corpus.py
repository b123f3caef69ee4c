"""Text in, Megatron .bin/.idx shards out: ted-scale tokenize --tokenizer T --out FOLDER/NAME INPUT...

documents.py reads, writer.py writes, output.py continues after a kill. Workers tokenize; this process reads and writes in
input order. So the bytes of the shards do not depend on workers or kills.
"""

import argparse
import collections
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale.base.errors import UserError, files_at
from ted_scale.base.exits import run_main
from ted_scale.corpora import examples, output
from ted_scale.corpora.documents import KEYS, find_files, read_documents, stop
from ted_scale.corpora.local import unfinished
from ted_scale.corpora.tokenizer import Tokenizer, digest, load_tokenizer
from ted_scale.corpora.writer import Encoded, Mark, Writer, dtype_of

BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 256
SHARD_TOKENS = 250_000_000  # 0.5 or 1 GB: a terabyte of text becomes about a thousand shards, a kill costs minutes


class Batch(NamedTuple):
    texts: list[str]
    marks: list[Mark]
    consumed: int


_worker: dict = {}


def _start_worker(encode) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent:
        # The worker exits with its parent, even after kill -9. The parent handles Ctrl-C.
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(encode=encode)


def _exit_after(parent) -> None:
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    return _worker["encode"](texts)


def encode_texts(encode, eod: int, dtype: numpy.dtype, texts: list[str]) -> Encoded:
    documents = encode(texts)
    for ids in documents:
        ids.append(eod)
    lengths = numpy.fromiter(map(len, documents), numpy.int64, len(documents))
    return Encoded(numpy.fromiter(chain.from_iterable(documents), dtype, lengths.sum()), lengths)


def encoder_of(reader: examples.Reader | None, tokenizer: Tokenizer):
    """What a worker does with a batch: `reader` is there where a document is an example with targets."""
    dtype = dtype_of(len(tokenizer.pieces))
    if reader:
        return partial(examples.encode_examples, reader, dtype)
    return partial(encode_texts, tokenizer.encode, tokenizer.eod, dtype)


def batches(documents, counts: collections.Counter):
    """Documents grouped for a worker; empty ones are counted and skipped."""
    texts, marks, characters, consumed = [], [], 0, 0
    for document in documents:
        consumed = document.consumed
        if not document.text.strip():
            counts["empty"] += 1
            continue
        texts.append(document.text)
        marks.append(Mark(document.file, document.line, counts["empty"], counts["skipped"]))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield Batch(texts, marks, consumed)
            texts, marks, characters = [], [], 0
    if texts:
        yield Batch(texts, marks, consumed)


def encode_all(groups, workers: int, encode):
    """(batch, encoded) in the order of the batches, at most a few batches ahead of the writer."""
    if workers == 1:
        _start_worker(encode)
        yield from ((group, _encode(group.texts)) for group in groups)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encode,))
    waiting = collections.deque()
    try:
        for group in groups:
            waiting.append((group, pool.submit(_encode, group.texts)))
            if len(waiting) > 3 * workers:
                group, future = waiting.popleft()
                yield group, future.result()
        for group, future in waiting:
            yield group, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def describe_job(args, files: list[Path], tokenizer: Tokenizer, reader: examples.Reader | None) -> dict:
    """Everything that decides the output's bytes. Only a command with the same job may continue an unfinished output."""
    options = (
        *(("targets",) if reader else ()),
        "text_key",
        "document_per",
        "parse_special",
        "on_error",
        "shard_tokens",
    )
    return {
        "tokenizer": str(args.tokenizer),
        "tokenizer_digest": digest(tokenizer),
        "tokenizer_content": tokenizer.content,
        "vocab_size": len(tokenizer.pieces),
        "eod_id": tokenizer.eod,
        "options": {name: getattr(args, name) for name in options},
        "sources": describe_sources(files),
        **({"json": "lines"} if any(".json" in path.suffixes for path in files) else {}),  # as one text each, before
        **(examples.describe(reader) if reader else {}),
    }


def describe_sources(files: list[Path]) -> list[dict]:
    stats = [path.stat() for path in files]
    return [
        {"path": str(p), "bytes": s.st_size, "modified_ns": s.st_mtime_ns} for p, s in zip(files, stats, strict=True)
    ]


def tokenize(args, files: list[Path], encode, job: dict) -> dict:
    """From files to shards and their manifest; shards that are finished already are skipped."""
    about = {key: job[key] for key in ("tokenizer", "tokenizer_digest", "vocab_size", "eod_id")}
    finished = output.begin(args.out, job, args.overwrite)
    if manifest := output.staged_manifest(args.out):
        return manifest
    writer = Writer(unfinished(args.out), about, args.shard_tokens, finished)
    mark = Mark(**finished[-1]["read"]) if finished else Mark()
    counts = collections.Counter(empty=mark.empty, skipped=mark.skipped)
    first: list[UserError] = []  # of those that were skipped

    def keep(error: UserError) -> None:
        first[:] = first or [error]

    def skip(error: UserError) -> None:
        counts["skipped"] += 1
        keep(error)

    on_error, on_late = (skip, keep) if args.on_error == "skip" else (stop, stop)
    keys = KEYS[args.targets] if args.targets else args.text_key
    documents = read_documents(files, keys, args.document_per, on_error, mark[:2])
    groups, late = encode_all(batches(documents, counts), args.workers, encode), [0]
    write(examples.accepted(groups, files, on_late, late), writer, job["sources"])
    counts["skipped"] += late[0]
    if not writer.sidecars:
        raise UserError(
            f"input {' '.join(args.inputs)} must hold a document with text, but holds none "
            f"({counts['empty']} empty, {counts['skipped']} skipped); check the files and "
            f"{'--targets' if args.targets else '--text-key'}{f'; the first that was skipped: {first[0]}' if first else ''}"
        )
    if describe_sources(files) != job["sources"]:
        raise UserError(
            "the input files must stay as they are while they are read, but one changed; pass --overwrite to start over"
        )
    return output.describe(args.out.name, job, writer.sidecars, dict(counts))


def write(groups, writer: Writer, sources: list[dict]) -> None:
    """Write batches into shards, with a progress bar of the input's bytes."""
    from tqdm import tqdm

    tokens, began = 0, time.perf_counter()
    with tqdm(total=sum(s["bytes"] for s in sources), unit="B", unit_scale=True, disable=None, mininterval=0.5) as bar:
        for group, encoded in groups:
            writer.add(encoded, group.marks)
            tokens += len(encoded.ids)
            rate = tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {len(writer.sidecars)} shards", refresh=False)
            bar.update(group.consumed - bar.n)
    writer.finish_shard()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn text into Megatron .bin/.idx shards.")
    parser.add_argument(
        "--tokenizer", required=True, help="sentencepiece .model, or Hugging Face tokenizer folder or hub id"
    )
    parser.add_argument("--out", required=True, type=Path, help="prefix of the shards: FOLDER/NAME")
    parser.add_argument("--text-key", default="text", help="key or column of the text in .jsonl, .parquet and .arrow")
    parser.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, help="start NAME-00002 … before a shard exceeds this"
    )
    parser.add_argument(
        "--workers", type=int, help="processes that tokenize; default: one a core, fewer for little text"
    )
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do at a document that cannot be read"
    )
    parser.add_argument(
        "--document-per",
        choices=("file", "line", "auto"),
        default="auto",
        help="for plain text, and for .json and .csv if given; auto: file",
    )
    parser.add_argument(
        "--parse-special", action="store_true", help="turn special tokens that a text spells out into tokens"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output of this name, or an unfinished one of another command",
    )
    parser.add_argument(
        "--targets",
        choices=tuple(KEYS),
        help='read "messages", whose targets are all turns of the assistant or the last one, or "prompt" and "completion"',
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="for messages; default: the tokenizer's own template"
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="text, .jsonl, .parquet, .arrow, also .gz/.zst; or folders"
    )
    args = parser.parse_args(argv)
    if args.chat_template and not args.targets:
        raise UserError(
            f"--chat-template must be left out without --targets, but is {args.chat_template}; add --targets assistant"
        )
    for name in ("workers", "shard_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, but is {getattr(args, name)}; leave it out")
    return args


def make(args) -> tuple[dict, int]:
    """(manifest of the output, bytes of the inputs)."""
    files = find_files(args.inputs)
    size = sum(path.stat().st_size for path in files)
    args.workers = args.workers or min(len(os.sched_getaffinity(0)), 1 + (size >> 21))
    tokenizer, reader = load_tokenizer(args.tokenizer, args.parse_special), None
    if args.targets:
        reader = examples.open_reader(args.tokenizer, args.targets, args.chat_template, args.parse_special)
    lock = output.claim(args.out)
    try:
        manifest = tokenize(args, files, encoder_of(reader, tokenizer), describe_job(args, files, tokenizer, reader))
        output.publish(args.out, manifest)
    finally:
        output.leave(args.out)
        lock.close()
    return manifest, size


def main(argv: list[str] | None = None) -> None:
    args, began = parse(argv), time.perf_counter()
    with files_at(args.out):
        manifest, size = make(args)
    print(
        f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens from {size:,} bytes -> {args.out}, "
        f"{len(manifest['shards'])} shard(s), in {time.perf_counter() - began:.1f} s; "
        f"{manifest['empty']} empty and {manifest['skipped']} unreadable left out"
    )


if __name__ == "__main__":
    run_main(main)
