"""The cost of keeping documents apart: every path of models/attention.py beside a dense [T, T] mask, in turn, in one process.

One layer's attention, forward and backward, over a row of T tokens of documents with lognormal lengths (median 300). The
dense arm is SDPA with a mask, or plain torch if scores are soft-capped.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.data.packing import Packing, pack, whole_rows
from ted_scale.models.attention import PATHS, Layer, causal_attention, choose_path
from tools.bench.memory import peak_bytes

CASES = {  # documents, window, soft-cap
    "documents": (True, None, None),
    "documents, window": (True, 512, None),
    "documents, soft-cap": (True, None, 50.0),
    "window": (False, 512, None),
    "soft-cap": (False, None, 50.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 2], metavar=("QUERY", "KEY"))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device must be cpu where there is no CUDA device, but is 'cuda'")
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    print(f"T {arguments.length}, heads {arguments.heads}, width {arguments.width}, {dtype}, torch {torch.__version__}")
    for name, (apart, window, softcap) in CASES.items():
        packing = documents(arguments.length, arguments.device) if apart else None
        measure(name, arguments, dtype, packing, window, softcap)


def documents(length: int, device: str) -> Packing:
    lengths = numpy.random.default_rng(0).lognormal(numpy.log(300), 1.0, size=length).astype(int) + 1
    begins = numpy.zeros((1, length), bool)
    borders = numpy.cumsum(lengths)
    begins[0, borders[borders < length]] = True
    return pack(begins).moved(lambda t: t.to(device))


def measure(name: str, arguments, dtype, packing, window, softcap) -> None:
    device, (heads, shared), width = torch.device(arguments.device), arguments.heads, arguments.width
    torch.manual_seed(0)
    sizes = [(1, count, arguments.length, width) for count in (heads, shared, shared)]
    tensors = [torch.randn(size, device=device, dtype=dtype).requires_grad_() for size in sizes]
    layer = Layer(width, width, window, softcap)
    chosen = choose_path(layer, arguments.length, packing is not None, dtype, device)
    seen = packing or whole_rows(1, arguments.length, device)
    ways = {"dense": dense, "tiled": PATHS["tiled"]} | ({chosen: PATHS[chosen]} if chosen in PATHS else {})
    arms = {n: lambda way=way: way(*tensors, seen, window, width**-0.5, softcap) for n, way in ways.items()}
    module = torch.nn.Module()
    module.num_key_value_groups = heads // shared
    arms["causal alone"] = lambda: causal_attention(module, *tensors, None)[0]
    times = in_turn(arms, tensors, arguments.turns, device)
    base = statistics.median(times["dense"])
    for arm in arms:
        ratio = statistics.median(a / d for a, d in zip(times[arm], times["dense"], strict=True))
        peak = peak_bytes(lambda arm=arm: both(arms[arm], tensors), arguments.device) / 2**20
        mark = " (chosen)" if arm == chosen else ""
        print(f"{name:22}{arm + mark:22}{ratio:7.3f} x dense ({base * 1e3:.0f} ms)   peak {peak:8.1f} MiB")


def in_turn(arms, tensors, turns: int, device) -> dict[str, list[float]]:
    times = {arm: [] for arm in arms}
    for turn in range(turns + 1):
        for arm, attention in arms.items():
            start = time.perf_counter()
            both(attention, tensors)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first compiles and allocates
                times[arm].append(time.perf_counter() - start)
    return times


def both(attention, tensors):
    out = attention()
    return torch.autograd.grad(out, tensors, torch.ones_like(out))


def dense(query, key, value, packing: Packing, window, scaling, softcap):
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    age = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    visible = (age >= 0) & (age <= packing.positions_BT[:, None, :, None])
    visible = visible & (age < window) if window else visible
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling)
    else:
        scores = torch.tanh(query @ key.transpose(2, 3) * scaling / softcap) * softcap
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
    return out.transpose(1, 2)


if __name__ == "__main__":
    run_main(main)
