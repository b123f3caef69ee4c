"""What a save costs a training step: only the copy to host memory, beside a save that the step waits for, in turn, on real
ZeRO-3 engines with a given size of state a rank. `deepspeed --num_gpus 2 tools/bench/saving.py --megabytes 500`
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

BYTES = 12  # of state for each parameter: fp32 master and two moments


class Run:
    def __init__(self, folder: Path):
        from ted_scale.config.operation import Checkpoint

        self.folder, self.name, self.checkpoint = folder, "saving", Checkpoint(keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500, help="state a rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where checkpoints go; default: the temporary folder")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    from ted_scale.ranks.group import start_ranks

    start_ranks()
    folder = [tempfile.mkdtemp(dir=arguments.folder)]
    dist.broadcast_object_list(folder, src=0)
    try:
        times = measure(Path(folder[0]), arguments.megabytes * 10**6 * dist.get_world_size() // BYTES, arguments.rounds)
    finally:
        dist.barrier()
        shutil.rmtree(folder[0], ignore_errors=True)
    if dist.get_rank() == 0:
        stall, waited = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(s / w for s, w in times)
        print(
            f"{arguments.megabytes} MB a rank, {dist.get_world_size()} ranks: stall {stall * 1e3:.0f} ms, a save that is waited "
            f"for {waited * 1e3:.0f} ms, ratio {ratio:.3f} (medians of {len(times)} in turn)"
        )
    dist.destroy_process_group()


def measure(folder: Path, parameters: int, rounds: int) -> list[tuple[float, float]]:
    """(stall, synchronous save) in seconds, of the slowest rank, after one of each that is not counted."""
    from ted_scale.checkpoints.progress import Progress
    from ted_scale.checkpoints.saver import Saver

    engine, saver, times = make_engine(parameters), Saver(Run(folder), None, print), []
    for number in range(rounds + 1):
        pair = []
        for background in (True, False):
            saver.settings = saver.settings.model_copy(update={"background": background})
            dist.barrier()
            began = time.perf_counter()
            saver.save(engine, Progress(step=2 * number + (not background)), with_filters=False)
            pair.append(torch.tensor(time.perf_counter() - began))
            saver.finish()
        dist.all_reduce(both := torch.stack(pair), op=dist.ReduceOp.MAX)
        times.append(tuple(both.tolist()))
    return times[1:]


def make_engine(parameters: int):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 2**31,
    }
    width = 1024
    with deepspeed.zero.Init(config_dict_or_path=config):
        module = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(max(1, parameters // width**2))))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


if __name__ == "__main__":
    main()
