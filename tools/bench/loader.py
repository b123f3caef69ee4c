"""The loader beside megatron-core's GPTDataset: python tools/bench/loader.py

One process reads the same samples through both, in turns, from the same shards: generated documents whose lengths are
those of web pages (log-normal, median 420 tokens, mean 730), each ended by one token. GPTDataset keeps its own reading
and is given an order: its three index arrays say our windows. Before anything is timed, tokens, labels, counted labels
and restarted positions of both are compared; ours are micro-batches, GPTDataset's are samples that nobody has stacked.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

from ted_scale.base.exits import run_main
from ted_scale.config.data import Data
from ted_scale.corpora.shards import document_borders, read_index
from ted_scale.corpora.writer import index_bytes
from ted_scale.data.loader import Loader
from ted_scale.data.stream import batch, open_stream

VOCABULARY = 50257
END = 0  # ends a document and stands nowhere else, which is how megatron finds documents


def write_corpus(folder: Path, tokens: int, shards: int) -> list[str]:
    rng = numpy.random.default_rng(0)
    for number in range(shards):
        lengths = (2 + rng.lognormal(numpy.log(420), 1.05, size=tokens // shards // 730)).astype(numpy.int32)
        ends = numpy.cumsum(lengths)
        ids = rng.integers(1, VOCABULARY, size=ends[-1], dtype=numpy.uint16)
        ids[ends - 1] = END
        prefix = folder / f"corpus-{number + 1:05d}"
        prefix.with_suffix(".bin").write_bytes(ids.data)
        prefix.with_suffix(".idx").write_bytes(index_bytes(lengths, ids.dtype))
    return [str(folder / f"corpus-{number + 1:05d}") for number in range(shards)]


def windows(stream) -> dict[int, int]:
    """Position in the first epoch → first token of its window."""
    interval = stream.interval
    count = (interval.domains[0].tokens - stream.seq_len) // stream.seq_len
    pieces = {position: next(interval.pieces(*interval.at(position))) for position in range(count)}
    return {position: first for position, (first, _) in pieces.items()}


def open_megatron(prefixes: list[str], seq_len: int, first_tokens: dict[int, int], attention: str, cache: str):
    """position → sample of a GPTDataset, for the positions whose window lies within one shard."""
    documents = attention == "document"
    warnings.simplefilter("ignore")  # megatron warns about packages that are not needed here
    logging.disable(logging.WARNING)
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=seq_len, blend=(prefixes, None), split="1", path_to_cache=cache,
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eod=END, pad=-1, unique_identifiers={}),
        reset_position_ids=documents, reset_attention_mask=documents, eod_mask_loss=True,
        create_attention_mask=False, defer_npy_index_mmap=True,
    )  # fmt: skip
    places, base = {}, 0
    for prefix in prefixes:
        index = read_index(prefix)
        borders = document_borders(index)
        inside = {p: f - base for p, f in first_tokens.items() if base <= f < base + index.tokens - seq_len}
        low = GPTDataset.build_low_level_dataset(prefix, config)
        dataset = GPTDataset(low, prefix, numpy.arange(index.documents, dtype=numpy.int32), None, Split.train, config)
        starts = numpy.arange(min(inside.values()), index.tokens, seq_len)
        rows = numpy.searchsorted(borders, starts, side="right") - 1
        dataset.document_index = numpy.arange(index.documents, dtype=numpy.int32)
        dataset.sample_index = numpy.stack([rows, starts - borders[rows]], axis=1).astype(numpy.int32)
        dataset.shuffle_index = numpy.arange(len(starts), dtype=numpy.uint32)
        places |= {p: (dataset, (first - int(starts[0])) // seq_len) for p, first in inside.items()}
        base += index.tokens
    return lambda position: dataset_item(*places[position]), sorted(places)


def dataset_item(dataset, number: int) -> dict[str, torch.Tensor]:
    return dataset[number]


def compare(stream, megatron, positions: list[int]) -> None:
    """The same samples with the same outputs; a label that does not count is nobody's business."""
    for position in positions:
        ours, theirs = batch(stream, [position]), megatron(position)
        counts = ours.weights_BT[0] > 0
        same = torch.equal(ours.tokens_BT[0], theirs["tokens"]) and torch.equal(ours.weights_BT[0], theirs["loss_mask"])
        same = same and torch.equal(ours.labels_BT[0][counts], theirs["labels"][counts])
        if ours.packing:
            same = same and torch.equal(ours.packing.positions_BT[0], theirs["position_ids"])
        if not same:
            raise SystemExit(f"sample {position} is not the same")


def seconds(read, places: list) -> float:
    """Nothing is kept: memory that is used again is what a training loop has."""
    began = time.perf_counter()
    for place in places:
        read(place)
    return time.perf_counter() - began


def measure(stream, megatron, positions: list[int], arguments) -> tuple[list[float], list[float]]:
    """Seconds of ours and of megatron's for the same positions, turn by turn, which goes first alternating."""
    ours, theirs = [], []
    for turn in range(arguments.turns):
        start = turn * arguments.samples % (len(positions) - arguments.samples)
        here = positions[start : start + arguments.samples]
        micros = [here[i : i + arguments.micro_batch] for i in range(0, len(here), arguments.micro_batch)]
        arms = [(ours, partial(batch, stream), micros), (theirs, megatron, here)]
        for times, read, places in arms if turn % 2 else reversed(arms):
            times.append(seconds(read, places))
    return ours, theirs


def measure_loader(stream, arguments) -> float:
    """Million tokens a second of drawing steps through a whole loader, by the median of the turns."""
    loader = Loader(prefetch=2, micro_batch=arguments.micro_batch, rank=0, world=1, device="cpu")
    samples = arguments.samples // (8 * arguments.micro_batch) * 8 * arguments.micro_batch
    stretch = {"start": 0, "stop": samples, "samples_per_step": 8 * arguments.micro_batch}
    times = [seconds(lambda _: None, loader.steps(stream, **stretch)) for _ in range(arguments.turns + 1)]
    loader.close()
    return samples * arguments.seq_len / 1e6 / statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=110e6, help="of the corpus, two bytes each")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--samples", type=int, default=800, help="read in a turn by either side")
    parser.add_argument("--turns", type=int, default=21)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefixes = write_corpus(Path(folder), int(arguments.tokens), arguments.shards)
        for attention in ("document", "causal"):
            values = {"corpora": [{"path": folder}], "seq_len": arguments.seq_len, "attention": attention}
            stream = open_stream(Data.model_validate(values), 1, VOCABULARY)
            megatron, positions = open_megatron(prefixes, arguments.seq_len, windows(stream), attention, folder)
            compare(stream, megatron, positions[:300])
            ours, theirs = (statistics.median(t) for t in measure(stream, megatron, positions, arguments))
            tokens = arguments.samples * arguments.seq_len / 1e6
            print(
                f"{attention:8}  ours {tokens / ours:6.1f} M tokens/s | GPTDataset "
                f"{tokens / theirs:6.1f} | ours / GPTDataset {theirs / ours:.2f} (medians of {arguments.turns} turns)",
                flush=True,
            )
        print(f"a whole loader, causal: {measure_loader(stream, arguments):.1f} M tokens/s")


if __name__ == "__main__":
    run_main(main)
