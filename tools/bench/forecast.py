"""A run's forecast beside the run: memory by counted tensors, then the time of a step, in turn with a calibration.

    python tools/bench/forecast.py --config RUN.toml [--set section.key=value] [--time] [--rounds 5]
    deepspeed --num_gpus 2 tools/bench/forecast.py --config RUN.toml ...

The filters are random. Note: the allocator's meter runs from before the models are built, because what lives between steps
counts as well. It makes everything slow, so that memory and time (--time) are two calls.
"""

import argparse
import gc
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ted_scale.base.exits import run_main
from ted_scale.config.run_file import load_run

MIB = 2**20
MARK = "counted step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--time", action="store_true", help="the time of a step instead of its memory")
    parser.add_argument("--rounds", type=int, default=5, help="of calibration and step")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run = load_run(arguments.config, arguments.set)

    import torch.distributed as dist

    from ted_scale.plan import make_plan
    from ted_scale.ranks.group import start_ranks

    device = start_ranks()
    plan = make_plan(run, dist.get_world_size())
    lines = time_lines(plan, device, arguments.rounds) if arguments.time else memory_lines(plan, device)
    if dist.get_rank() == 0:
        print("\n".join(lines), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def memory_lines(plan, device) -> list[str]:
    """Of the stage that trains the student, in its third step."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from ted_scale.distill import memory

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = step_of(plan, device)
        step()
        step()
        gc.collect()
        with record_function(MARK):
            step()
    rest, peak = counted(recorded)
    found, _ = memory.terms(plan, plan.stages[-1], "cpu")
    found.pop("copy for a save")
    resting = sum(size for name, size in found.items() if name in memory.resting(plan, plan.stages[-1], "cpu"))
    whole = sum(found.values())
    terms = ", ".join(f"{name} {size / MIB:.1f}" for name, size in found.items() if size)
    return [
        f"MiB between steps: forecast {resting / MIB:.1f}, counted {rest / MIB:.1f} ({resting / rest - 1:+.1%})",
        f"MiB at the peak: forecast {whole / MIB:.1f}, counted {peak / MIB:.1f} ({whole / peak - 1:+.1%}); {terms}",
    ]


def counted(recorded) -> tuple[int, int]:
    """(bytes that live when the marked step begins, the most in it)"""
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    mark = next(event for event in events if event.name() == MARK)
    live = rest = peak = 0
    for event in (e for e in events if e.name() == "[memory]" and e.start_ns() <= mark.start_ns() + mark.duration_ns()):
        live += event.nbytes()
        if event.start_ns() < mark.start_ns():
            rest = live
        else:
            peak = max(peak, live)
    return rest, peak


def step_of(plan, device):
    """A call takes the trainer's next step."""
    import torch.distributed as dist

    from ted_scale.data.loader import Loader
    from ted_scale.data.stream import open_stream
    from ted_scale.engines import build_student, build_teacher
    from tools.bench.step import TrainerArm
    from tools.bench.step_parts import Stopwatch

    run, stage, teacher = plan.run, plan.stages[-1], build_teacher(plan)
    arm = TrainerArm(plan, stage, build_student(plan, stage, teacher, None), teacher, device)
    place = {"rank": dist.get_rank(), "world": dist.get_world_size(), "device": device}
    shared = {"sequence_parallel": run.data.sequence_parallel}
    loader = Loader(prefetch=run.data.prefetch, micro_batch=run.train.micro_batch, **place, **shared)
    data = loader.steps(
        open_stream(run.data, run.seed, plan.vocabulary), start=0, samples_per_step=stage.samples_per_step
    )
    return lambda detailed=False: arm.step(next(data), Stopwatch(device, detailed=detailed))


def time_lines(plan, device, rounds: int) -> list[str]:
    """Each round measures the machine and takes steps for about as long; the forecast is of the medians."""
    from ted_scale.commands.planning.calibrate import actions as probes
    from ted_scale.commands.planning.calibrate import machine_from, timed
    from ted_scale.forecast import step as forecast
    from ted_scale.ranks.capacity import local_ranks

    actions, step = probes(plan, device), step_of(plan, device)
    taken, steps = {name: [] for name in actions}, []
    for number in range(rounds + 1):
        for name, action in actions.items():
            taken[name].append(timed(action, device))
        steps.append(timed(step, device))
        if number == 0:  # the first round allocates
            taken, steps = {name: [] for name in actions}, []
    machine = machine_from(plan, device, {name: statistics.median(times) for name, times in taken.items()})
    stage = plan.stages[-1]
    found = forecast.seconds(plan, stage, stage.first_step, machine, local_ranks(plan.world))
    whole, measured = sum(found.values()), statistics.median(steps)
    terms = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in found.items() if value)
    return [
        f"ms a step: forecast {whole * 1e3:.1f}, measured {measured * 1e3:.1f} ({whole / measured - 1:+.1%}), from "
        f"{min(steps) * 1e3:.1f} to {max(steps) * 1e3:.1f}; {terms}"
    ]


if __name__ == "__main__":
    run_main(main)
