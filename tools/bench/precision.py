"""What a teacher loses in 8 bits: python tools/bench/precision.py MODEL CORPUS [--bits int8 fp8] [--tokens 8192]

KL to the bf16 model and the relative error of each block's state, by the code that says so at the start of a run, on the first
windows of a corpus. On a CPU fp8 is torchao's own, with torch's product of fp8 rows, and torchao's question for a GPU is left out.
"""

import argparse
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

import torch

from ted_scale.base.exits import run_main
from ted_scale.config.data import Data
from ted_scale.config.method import Loss
from ted_scale.data.stream import open_stream, validation_batches
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.models import quantized
from ted_scale.models.inspection import inspect
from ted_scale.teacher_start import cost_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--bits", nargs="+", default=["int8", "fp8"], choices=["int8", "fp8"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    anatomy = inspect("MODEL", str(arguments.model))
    for bits in arguments.bits:
        report(anatomy, bits, batch_of(arguments, anatomy.vocab_size, device), device)


def batch_of(arguments, vocabulary: int, device):
    data = Data(seq_len=arguments.length, corpora=[{"path": str(arguments.corpus)}])
    rows = arguments.tokens // arguments.length
    settings = {"tokens": arguments.tokens, "micro_batch": rows, "rank": 0, "world": 1, "device": device}
    stream = open_stream(data, 0, vocabulary)._replace(count=rows)
    return next(validation_batches(stream, **settings))


def report(anatomy, bits: str, batch, device) -> None:
    quantized.check(bits, anatomy)
    print(quantized.describe(anatomy, bits))
    began = time.perf_counter()
    with asking_no_gpu():
        network = quantized.build_quantized(anatomy, bits, init="weights", seed=0, device=device)
    counts = quantized.counts(anatomy, bits)
    print(f"{counts.bytes / 1e6:,.1f} MB instead of {2 * anatomy.parameters / 1e6:,.1f}, read in "
          f"{time.perf_counter() - began:.1f} s")  # fmt: skip
    blocks = list(range(anatomy.layers))
    body = TeacherBody(network, anatomy, blocks)
    exact = TeacherBody(quantized.unrounded(network, anatomy, device), anatomy, blocks)
    cost = cost_of(Teacher(body, body), exact, batch, Loss())
    print(f"on {batch.tokens_BT.numel()} tokens: {cost}")
    print("  ".join(f"{block}: {error:.4f}" for block, error in cost.errors.items()), flush=True)


def asking_no_gpu():
    from torchao.quantization import quant_api

    return mock.patch.object(quant_api, "_check_hardware_support", lambda *_: None)


if __name__ == "__main__":
    run_main(main)
