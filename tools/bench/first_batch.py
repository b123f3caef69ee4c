"""The first batch at position 0 beside that at 10^9: python tools/bench/first_batch.py

Processes take turns, each forked from one that has imported everything. Each opens a corpus of generated documents, reads
the first step of a loader at its position, and reports its time and its peak memory above the start.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

from ted_scale.config.data import Data
from ted_scale.data.loader import Loader
from ted_scale.data.stream import open_stream
from tools.bench.loader import VOCABULARY, write_corpus

FAR = 10**9


def memory(key: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def first_batch(prefixes: list[str], position: int, said) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = memory("VmRSS"), time.perf_counter()
    corpora = [{"path": prefix, "weight": 1.0 + i} for i, prefix in enumerate(prefixes)]
    data = Data.model_validate({"corpora": corpora, "seq_len": 4096, "attention": "document"})
    loader = Loader(prefetch=data.prefetch, micro_batch=4, rank=0, world=1, device="cpu")
    next(loader.steps(open_stream(data, 1, VOCABULARY), start=position, samples_per_step=16))
    seconds = time.perf_counter() - began
    loader.close()
    said.send((seconds * 1e3, memory("VmHWM") - before))


def alone(prefixes: list[str], position: int) -> tuple[float, float]:
    """(milliseconds, MiB), in a process of its own."""
    context = multiprocessing.get_context("fork")  # nothing here has threads yet
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=first_batch, args=(prefixes, position, theirs))
    process.start()
    result = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=110e6, help="of the corpora, two bytes each")
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefixes = write_corpus(Path(folder), int(arguments.tokens), 4)
        alone(prefixes, 0)
        pairs = []
        for turn in range(arguments.rounds):
            order = (0, FAR) if turn % 2 else (FAR, 0)
            results = {position: alone(prefixes, position) for position in order}
            pairs.append((*results[0], *results[FAR]))
    near_ms, near_mib, far_ms, far_mib = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"first batch at 0: {near_ms:.1f} ms, {near_mib:.1f} MiB | at 10^9: {far_ms:.1f} ms, {far_mib:.1f} MiB | "
        f"time at 10^9 / at 0 {far_ms / near_ms:.3f} (medians of {len(pairs)})"
    )


if __name__ == "__main__":
    main()
