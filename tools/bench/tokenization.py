"""tokenize_corpus.py beside the tokenizer alone: python tools/bench/tokenization.py --tokenizer FOLDER INPUT...

The tool's time is that of the whole command, from its start to published shards. The tokenizer's time is one
encode_batch_fast of the `tokenizers` library over all texts, already in memory, on all of its threads, without its loading.
Both take turns; medians are compared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.corpora.documents import find_files, read_documents

ROOT = Path(__file__).resolve().parents[2]


def tool_seconds(tokenizer: str, inputs: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(ROOT / "tools/tokenize_corpus.py"), "--tokenizer", tokenizer]
        began = time.perf_counter()
        subprocess.run(
            [*command, "--on-error", "skip", "--out", f"{folder}/c", *inputs], check=True, capture_output=True
        )
        return time.perf_counter() - began


def alone_seconds(tokenizer: str, texts: list[str], clock=time.perf_counter) -> float:
    """With a new tokenizer each time, because a used one has its words in a cache."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    began = clock()
    backend.encode_batch_fast(texts, add_special_tokens=False)
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="The rate of tokenize_corpus.py beside the tokenizer's own.")
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    arguments = parser.parse_args()
    if not (Path(arguments.tokenizer) / "tokenizer.json").is_file():
        raise UserError(
            f"--tokenizer must be a folder with a tokenizer.json, but is {arguments.tokenizer}; name another"
        )
    texts = [d.text for d in read_documents(find_files(arguments.inputs), on_error=lambda _: None) if d.text.strip()]
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {size:,.1f} MB, {len(os.sched_getaffinity(0))} cores", flush=True)
    tool, alone = [], []
    for _ in range(arguments.repeats):
        alone.append(alone_seconds(arguments.tokenizer, texts))
        tool.append(tool_seconds(arguments.tokenizer, arguments.inputs))
        print(f"alone {size / alone[-1]:.2f} MB/s, tool {size / tool[-1]:.2f} MB/s", flush=True)
    ratio = statistics.median(alone) / statistics.median(tool)
    print(
        f"medians: alone {statistics.median(alone):.2f} s, tool {statistics.median(tool):.2f} s, rate tool / alone {ratio:.2f}"
    )


if __name__ == "__main__":
    run_main(main)
