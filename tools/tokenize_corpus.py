"""Text in, Megatron .bin/.idx shards out: python tools/tokenize_corpus.py --tokenizer T --out FOLDER/NAME INPUT...

Reading is documents.py's part, writing shard_writer.py's. Workers tokenize, this process reads and writes in input
order. The surprise: so the shards do not depend on the number of workers, byte for byte.
"""

import argparse
import collections
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy

from ted_scale.documents import find_files, read_documents, stop
from ted_scale.errors import UserError, run_main
from ted_scale.shard_writer import Encoded, Writer, clear_temporaries, existing
from ted_scale.tokenizer import load_tokenizer

BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 256


class Batch(NamedTuple):
    texts: list[str]
    consumed: int


_worker: dict = {}


def _start_worker(path: str, parse_special: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent:
        # The parent's end is the worker's end, even by kill -9; Ctrl-C is the parent's to handle.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker["tokenizer"] = load_tokenizer(path, parse_special)


def _encode(texts: list[str]) -> Encoded:
    tokenizer = _worker["tokenizer"]
    documents = [[*ids, tokenizer.eod] for ids in tokenizer.encode(texts)]
    ids = numpy.fromiter((i for document in documents for i in document), numpy.int32)
    return Encoded(ids, [len(document) for document in documents])


def batches(documents, counts: collections.Counter):
    """Documents grouped for a worker; empty ones are counted and left out."""
    texts, characters, consumed = [], 0, 0
    for document in documents:
        consumed = document.consumed
        if not document.text.strip():
            counts["empty"] += 1
            continue
        texts.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield Batch(texts, consumed)
            texts, characters = [], 0
    if texts:
        yield Batch(texts, consumed)


def encode_all(groups, workers: int, tokenizer: tuple):
    """(batch, encoded) in the order of the batches, at most a few batches ahead of the writer."""
    if workers == 1:
        _start_worker(*tokenizer)
        yield from ((group, _encode(group.texts)) for group in groups)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=tokenizer)
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


def _claim(out: Path, overwrite: bool):
    """Lock the output name, refuse one that is taken, clear what a dead run left; the lock ends with the process."""
    if out.is_dir() or out.name.endswith((".bin", ".idx")):
        raise UserError(
            f"--out must be a prefix like FOLDER/NAME without ending, but is {out}; add or shorten the name"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if not overwrite and any(path.suffix == ".idx" for path in existing(out)):
        raise UserError(f"--out {out} must be a new name, but exists; choose another or pass --overwrite")
    lock = out.with_name(f".{out.name}.lock").open("w")  # held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--out {out} must be written by one run, but another one is writing it; wait for it") from None
    clear_temporaries(out)
    return lock


def tokenize(args, files: list[Path], counts: collections.Counter) -> float:
    """Everything from files to published shards; the seconds it took."""
    from tqdm import tqdm

    def skip(_error: UserError) -> None:
        counts["skipped"] += 1

    writer = Writer(args.out, args.shard_tokens, args.tokenizer, load_tokenizer(args.tokenizer, args.parse_special))
    documents = read_documents(files, args.text_key, args.document_per, skip if args.on_error == "skip" else stop)
    size, began = sum(path.stat().st_size for path in files), time.perf_counter()
    groups = encode_all(batches(documents, counts), args.workers, (args.tokenizer, args.parse_special))
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, mininterval=0.5) as bar:
        for group, encoded in groups:
            writer.add(encoded)
            counts["documents"] += len(encoded.lengths)
            counts["tokens"] += len(encoded.ids)
            rate = counts["tokens"] / (time.perf_counter() - began)
            bar.set_postfix_str(f"{counts['documents']} documents, {rate:,.0f} tokens/s", refresh=False)
            bar.update(group.consumed - bar.n)
    if not counts["documents"]:
        raise UserError(
            f"input {' '.join(args.inputs)} must hold a document with text, but holds none "
            f"({counts['empty']} empty, {counts['skipped']} skipped); check the files and --text-key"
        )
    writer.publish()
    counts["shards"] = len(writer.names)
    return time.perf_counter() - began


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn text into Megatron .bin/.idx shards.")
    parser.add_argument(
        "--tokenizer", required=True, help="sentencepiece .model, or Hugging Face tokenizer folder or name"
    )
    parser.add_argument("--out", required=True, type=Path, help="prefix of the shards: FOLDER/NAME")
    parser.add_argument("--text-key", default="text", help="key or column of the text in .jsonl and .parquet")
    parser.add_argument("--shard-tokens", type=int, help="begin NAME-00002 … before a shard grows beyond this")
    parser.add_argument(
        "--workers", type=int, help="processes that tokenize; default: one a core, fewer for little text"
    )
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a document that cannot be read"
    )
    parser.add_argument(
        "--document-per", choices=("file", "line", "auto"), default="auto", help="plain text; auto: file"
    )
    parser.add_argument(
        "--parse-special", action="store_true", help="special tokens spelled out in a text become tokens"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of this name")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text, .jsonl, .parquet, also .gz/.zst; or folders")
    args = parser.parse_args(argv)
    for name in ("workers", "shard_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, but is {getattr(args, name)}; leave it out")
    return args


def main(argv: list[str] | None = None) -> None:
    args, counts = parse(argv), collections.Counter()
    files = find_files(args.inputs)
    size = sum(path.stat().st_size for path in files)
    args.workers = args.workers or min(len(os.sched_getaffinity(0)), 1 + (size >> 21))
    lock = _claim(args.out, args.overwrite)
    try:
        seconds = tokenize(args, files, counts)
    finally:
        clear_temporaries(args.out)
        Path(lock.name).unlink()
        lock.close()
    print(
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens from {size:,} bytes in {seconds:.1f} s "
        f"({counts['tokens'] / seconds:,.0f} tokens/s) -> {args.out}, {counts['shards']} shard(s); "
        f"{counts['empty']} empty and {counts['skipped']} unreadable left out"
    )


if __name__ == "__main__":
    run_main(main)
