"""What a teacher loses in 8 bits: python tools/bench/precision.py MODEL CORPUS [--bits int8 fp8] [--tokens 8192]

KL to the bf16 model and the relative error of each block's state, by the code that says so at the start of a run, on the first
windows of a corpus. On a CPU torchao rounds to fp8, and the product of what it rounded is one of fp32: torch's own is slow there.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

import torch

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.config.data import Data
from ted_scale.config.method import Loss
from ted_scale.data.stream import open_stream, validation_batches
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.health.teacher_start import cost_of
from ted_scale.models import quantized
from ted_scale.models.inspection import inspect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--bits", nargs="+", default=["int8", "fp8"], choices=["int8", "fp8"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    if arguments.tokens < arguments.length:
        raise UserError(f"--tokens must hold a window of --length ({arguments.length}), but is {arguments.tokens}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    anatomy = inspect("MODEL", str(arguments.model), is_frozen=True)
    batch = batch_of(arguments, anatomy.vocab_size, device)
    with fp8_without_gpu() if device.type == "cpu" else contextlib.nullcontext():
        for bits in arguments.bits:
            report(anatomy, bits, batch, device)


def batch_of(arguments, vocabulary: int, device):
    data = Data(seq_len=arguments.length, corpora=[{"path": str(arguments.corpus)}])
    rows = arguments.tokens // arguments.length
    settings = {"tokens": arguments.tokens, "micro_batch": rows, "rank": 0, "world": 1, "device": device}
    stream = open_stream(data, 0, vocabulary)._replace(count=rows)
    return next(validation_batches(stream, **settings))


def report(anatomy, bits: str, batch, device) -> None:
    quantized.check(bits, anatomy)
    print(quantized.describe(anatomy, bits))
    network = quantized.build_quantized(anatomy, bits, init="weights", seed=0, device=device)
    counts = quantized.counts(anatomy, bits)
    print(f"{counts.bytes / 1e6:,.1f} MB instead of {2 * anatomy.parameters / 1e6:,.1f}")
    blocks = list(range(anatomy.layers))
    body = TeacherBody(network, anatomy, blocks)
    exact = TeacherBody(quantized.unrounded(network, anatomy, device), anatomy, blocks)
    cost = cost_of(Teacher(body, body), exact, batch, Loss())
    print(f"on {batch.tokens_BT.numel()} tokens: {cost}")
    print("  ".join(f"{block}: {error:.4f}" for block, error in cost.errors.items()), flush=True)


@contextlib.contextmanager
def fp8_without_gpu():
    """torchao asks for a GPU that has fp8. Here it is not asked, and its product is another one."""
    from torchao.quantization import quant_api
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor

    with (
        mock.patch.object(quant_api, "_check_hardware_support", lambda *_: None),
        mock.patch.object(float8_tensor, "addmm_float8_unwrapped_inference", product),
    ):
        yield


def product(a, scale_a, b, scale_b, output_dtype, bias=None, **_):
    found = (a.float() * scale_a) @ (b.float() * scale_b)
    return (found if bias is None else found + bias).to(output_dtype)


if __name__ == "__main__":
    run_main(main)
