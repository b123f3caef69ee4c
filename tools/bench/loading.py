"""How long a rank takes to load its part of a model, and the memory it takes: deepspeed --num_gpus 2 tools/bench/loading.py FOLDER

With --whole every rank has all of it, as a replicated teacher. Memory is the process's own peak while it loads, beyond what it
had before; files are read past the page cache or from it, as the system has them.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

import torch
import torch.distributed as dist

from ted_scale.base.exits import run_main
from ted_scale.models.inspection import inspect
from ted_scale.models.weights import build_network
from ted_scale.models.zero import is_sharded, shape_of
from ted_scale.ranks.group import start_ranks

ZERO = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--local_rank", type=int, help="of the launcher")
    arguments = parser.parse_args()
    anatomy = inspect("teacher.path", arguments.folder)
    start_ranks()
    before, began = begin(), time.monotonic()
    network = build_network(anatomy, ds_config=None if arguments.whole else ZERO, dtype=torch.bfloat16)
    seconds, peak = time.monotonic() - began, memory("VmHWM") - before
    held = [p.ds_tensor.nbytes if is_sharded(p) else p.nbytes for p in network.parameters()]
    tensor = max(2 * torch.Size(shape_of(p)).numel() for p in network.parameters())
    print(
        f"rank {dist.get_rank()} of {dist.get_world_size()}: {anatomy.parameters / 1e9:.2f} B parameters, {seconds:.1f} s, "
        f"peak {peak / 1e6:,.0f} MB; its part {sum(held) / 1e6:,.0f} MB, the largest tensor {tensor / 1e6:,.0f} MB",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()


def begin() -> int:
    """What is used now; VmHWM counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run_main(main)
