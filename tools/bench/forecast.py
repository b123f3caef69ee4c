"""A run's forecast beside the run: memory by counted tensors, and the time of a step.

    python tools/bench/forecast.py --config RUN.toml [--set section.key=value] [--machine FILE]
    deepspeed --num_gpus 2 tools/bench/forecast.py --config RUN.toml ...

Note: on a CPU the allocator's meter runs from before the models are built, because what lives between steps counts as well.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ted_scale.base.exits import run_main
from ted_scale.config.run_file import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    measure_memory(load_run(arguments.config, arguments.set))


def measure_memory(run) -> None:
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile, record_function

    from ted_scale.distill import memory
    from ted_scale.plan import make_plan
    from ted_scale.ranks.group import start_ranks
    from ted_scale.data.loader import Loader
    from ted_scale.data.stream import open_stream

    device = start_ranks()
    plan = make_plan(run, dist.get_world_size())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = arm_of(plan, device)
        loader = Loader(
            prefetch=2, micro_batch=run.train.micro_batch, rank=dist.get_rank(), world=dist.get_world_size(), device=device
        )
        stream = open_stream(run.data, run.seed, plan.vocabulary)
        data = loader.steps(stream, start=0, samples_per_step=run.train.tokens_per_step // run.data.seq_len)
        for _ in range(2):
            step(next(data))
        micro_batches = next(data)
        with record_function("counted"):
            step(micro_batches)
    rest, peak = counted(recorded)
    found, _ = memory.terms(plan, plan.stages[-1], "cpu")
    found.pop("copy for a save")
    if dist.get_rank() == 0:
        for name, size in found.items():
            print(f"{name:16} {size / 2**20:10.2f} MiB")
        print(f"rest {rest / 2**20:.2f} MiB, peak {peak / 2**20:.2f} MiB, forecast {sum(found.values()) / 2**20:.2f}")
    dist.barrier()
    dist.destroy_process_group()


def arm_of(plan, device):
    from ted_scale.checkpoints.progress import Progress
    from ted_scale.engines import build_student, build_teacher
    from ted_scale.health.guard import Guard
    from ted_scale.metrics.metrics import Metrics
    from ted_scale.train import train

    stage, teacher = plan.stages[-1], build_teacher(plan)
    engine = build_student(plan, stage, teacher, None)
    numbers = Metrics(plan.run, writes=False, total_steps=10**6, step=0, device=device, wandb_run=None)
    guard = Guard(engine, stage, lambda *said: print(*said), lambda: None)
    at = [Progress(stage.first_step)]

    def step(micro_batches) -> None:
        at[0] = train(
            stage, engine, teacher, [micro_batches], guard, numbers, at[0], verify=lambda *_: None,
            validate=lambda _, progress: (progress, False), save=lambda *_: None,
        )  # fmt: skip

    return step


def counted(recorded) -> tuple[int, int]:
    """(bytes that live before the marked step, the most in it)"""
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    marked = next(e for e in events if e.name() == "counted")
    live = rest = peak = 0
    top = []
    for event in events:
        if event.start_ns() > marked.start_ns() + marked.duration_ns():
            break
        if event.name() == "[memory]":
            live += event.nbytes()
            if event.start_ns() < marked.start_ns():
                rest = live
            elif live > peak:
                peak = live
    return rest, peak


if __name__ == "__main__":
    run_main(main)
