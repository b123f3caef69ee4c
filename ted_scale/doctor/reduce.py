"""A rank of the doctor's process group: it adds a tensor over all ranks, checks the sum, and rank 0 prints the rate.

It is started by its path, on other machines too, so it imports torch alone. Note: it ends itself after so many seconds, because
nobody else may reach it there.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import time
from datetime import timedelta

MARK = "TED_SCALE_REDUCED "
BYTES = {"nccl": 2**28, "gloo": 2**24}
TIMES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--local_rank", type=int)  # of DeepSpeed's launcher
    arguments = parser.parse_args()
    signal.alarm(arguments.seconds)

    import torch
    import torch.distributed as dist

    on_gpu, wait = torch.cuda.is_available(), timedelta(seconds=arguments.seconds)
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=wait)
    groups = (
        {"nccl": (None, "cuda"), "gloo": (dist.new_group(backend="gloo"), "cpu")} if on_gpu else {"gloo": (None, "cpu")}
    )
    found = {name: measured(torch, dist, BYTES[name], *of) for name, of in groups.items()}
    hosts = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname(), group=groups["gloo"][0])
    if dist.get_rank() == 0:
        print(MARK + json.dumps({"ranks": len(hosts), "hosts": sorted(set(hosts)), "backends": found}), flush=True)
    dist.barrier(group=groups["gloo"][0])
    dist.destroy_process_group()


def measured(torch, dist, size: int, group, device: str) -> dict:
    """Whether every sum was right on every rank, the median seconds of one number, and the bytes a second that a rank receives."""
    big = torch.empty(size // 4, device=device)
    alone = [reduced(torch, dist, torch.empty(1, device=device), group) for _ in range(TIMES)]
    many = [reduced(torch, dist, big, group) for _ in range(TIMES)]
    right = torch.tensor([float(all(is_right for is_right, _ in alone + many))], device=device)
    dist.all_reduce(right, op=dist.ReduceOp.MIN, group=group)
    world = dist.get_world_size()
    received = 2 * (world - 1) / world * size  # a ring's: what reduces it, and what spreads the sum
    return {
        "right": bool(right.item()), "one_s": statistics.median(took for _, took in alone),
        "bytes_per_s": received / statistics.median(took for _, took in many[1:]),
    }  # fmt: skip


def reduced(torch, dist, tensor, group) -> tuple[bool, float]:
    """Rank r adds r + 1 everywhere. All ranks begin together."""
    world = dist.get_world_size()
    tensor.fill_(dist.get_rank() + 1)
    dist.barrier(group=group)
    began = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    return bool((tensor == world * (world + 1) / 2).all()), took


if __name__ == "__main__":
    main()
