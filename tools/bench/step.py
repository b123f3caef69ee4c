"""The time of a training step by parts, beside plain torch in the same process, and the bytes that ranks send each other.

Arms take turns on the same micro-batches: the trainer's own loop for each method, the teacher's forward alone, plain torch as
people write it, and the parts of `kd` alone. One process is measured twice: with the default allocator, and with one that
keeps its memory. Several ranks (`deepspeed --num_gpus 2 tools/bench/step.py …`) compare bytes with the minimum that ZeRO-3
must move.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.config.run_file import load_run

METHODS = ("ce", "kd", "lwd", "ted")
GIB = 1 << 30
KEPT = {"MALLOC_MMAP_THRESHOLD_": 8 * GIB, "MALLOC_TRIM_THRESHOLD_": 8 * GIB, "MALLOC_TOP_PAD_": GIB}


def main() -> None:
    arguments = parse()
    if "RANK" in os.environ or arguments.memory == "as it is":
        measure(load_run(arguments.config, arguments.set), arguments)
        return
    for memory, settings in {"default": {}, "kept": KEPT}.items():
        if arguments.memory in (memory, "both"):
            print(f"memory: {memory}", flush=True)
            environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
            command = [sys.executable, *sys.argv, "--memory", "as it is"]
            if (code := subprocess.run(command, env=environment, check=False).returncode) != 0:
                sys.exit(code)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a run file; ted uses the filters in the run's folder")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument(
        "--arms", nargs="+", default=["kd"], help='methods; more settings follow in the same word: "kd teacher.every=4"'
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--no-plain", action="store_true", help="without plain torch and the parts alone")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where others share the cores")
    parser.add_argument("--memory", choices=["default", "kept", "both", "as it is"], default="both")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(run, arguments) -> None:
    import torch
    import torch.distributed as dist

    from ted_scale.ranks.group import start_ranks

    device = start_ranks()
    arms = trainer_arms(run, arguments, device)
    if not arguments.no_plain and dist.get_world_size() == 1:
        arms |= plain_arms(run, device)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds, parts = in_turn(arms, arguments.steps, run, device, clock)
    if dist.get_rank() == 0:
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
        print("\n".join(table(seconds, parts, run.train.tokens_per_step)), flush=True)
    if dist.get_world_size() > 1:
        count_traffic({name: arm for name, arm in arms.items() if isinstance(arm, TrainerArm)}, run, device)
    dist.barrier()
    dist.destroy_process_group()


class TrainerArm:
    """train.py's loop, a step at a time."""

    def __init__(self, plan, stage, engine, teacher, device):
        from ted_scale.checkpoints.progress import Progress
        from ted_scale.health.guard import Guard
        from ted_scale.metrics.metrics import Metrics

        self.plan, self.stage, self.engine, self.teacher = plan, stage, engine, teacher
        self.filters = getattr(teacher, "filters", None)
        settings = {"total_steps": stage.last_step, "step": 0, "device": device, "wandb_run": None}
        self.numbers = Metrics(plan.run, writes=False, **settings)
        self.guard = Guard(engine, stage, lambda *said: print(*said), lambda: None)
        self.progress = Progress(stage.first_step)

    def step(self, micro_batches, watch) -> None:
        from ted_scale.train import train
        from tools.bench.step_parts import places, replaced

        lend(self.teacher, self.filters)
        with replaced(places(self.engine, self.teacher) if watch.detailed else [], watch.around):
            self.progress = train(
                self.stage, self.engine, self.teacher, [micro_batches], self.guard, self.numbers, self.progress,
                verify=lambda *_: None, validate=lambda _, progress: (progress, False), write_samples=lambda *_: False,
                save=lambda *_: None,
            )  # fmt: skip


class TeacherAlone:
    """Its forward for every micro-batch of a step, as `kd` asks for it, or as a model has it that ends with logits."""

    def __init__(self, arm: TrainerArm, logits: bool):
        self.teacher, self.logits = arm.teacher, logits

    def step(self, micro_batches, watch) -> None:
        from ted_scale.distill.signal import Weights
        from ted_scale.models.zero import gathered

        for batch in micro_batches:
            states = self.teacher(batch, Weights(ce=1.0, kl=1.0, layer=0.0)).last_NE
            if self.logits:
                with gathered(self.teacher.projection):
                    states @ self.teacher.head.weight.t()


def count_traffic(arms: dict, run, device) -> None:
    """In the second of two steps: DeepSpeed learns the order of modules in the first."""
    import torch.distributed as dist

    from tools.bench.step_parts import Stopwatch, Traffic, replaced

    for name, arm in arms.items():
        traffic, watch = Traffic(arm.engine, arm.teacher), Stopwatch(device)
        data = batches(run, device)
        arm.step(next(data), watch)
        micro_batches = next(data)
        with replaced(traffic.places(), traffic.around):
            arm.step(micro_batches, watch)
        if dist.get_rank() == 0:
            print("\n".join([name, *traffic.lines(len(micro_batches))]), flush=True)


def trainer_arms(run, arguments, device) -> dict:
    import torch.distributed as dist

    from ted_scale.engines import build_student, build_teacher
    from ted_scale.plan import make_plan

    runs = {arm: variant(arguments, number) for number, arm in enumerate(arguments.arms)}
    plans = {arm: make_plan(of_arm, dist.get_world_size()) for arm, of_arm in runs.items()}
    asked = max(plans, key=lambda arm: METHODS.index(arm.split()[0]))  # its teacher has the taps that all methods need
    teacher, arms = build_teacher(plans[asked]), {}
    for arm, plan in plans.items():
        lend(teacher, None)
        engine = build_student(plan, plan.stages[-1], teacher, plan.filters_file)
        arms[arm] = TrainerArm(plan, plan.stages[-1], engine, teacher, device)
    alone = {"teacher alone": False, "teacher and its logits": True} if plans[asked].teacher else {}
    return arms | {name: TeacherAlone(arms[asked], logits) for name, logits in alone.items()}


def lend(teacher, filters) -> None:
    """Filters for the teacher of all arms to keep its states with; None: it keeps the states."""
    if hasattr(teacher, "keep_filtered"):
        teacher.keep_filtered(filters)


def variant(arguments, number: int):
    """The run with an arm's method and settings, enough steps, a folder of its own, and the filters of the original run."""
    method, *settings = arguments.arms[number].split()
    if others := [word for word in settings if word.startswith("teacher.") and not word.startswith("teacher.every=")]:
        raise UserError(f"--arms must have one teacher, but one says {others[0]}; give it to all of them by --set")
    run = load_run(arguments.config, [*arguments.set, f"method={method}", *settings])
    filters = run.filters.model_copy(update={"from_run": str(run.folder)})
    train = run.train.model_copy(update={"steps": 10**6})
    return run.model_copy(update={"name": f"{run.name}-{number}-step", "filters": filters, "train": train})


def plain_arms(run, device) -> dict:
    from tools.bench.plain_step import Alone, PlainTorch

    if run.teacher is None:
        raise UserError("teacher.path must be set to be compared with plain torch, but there is no [teacher]")
    plain = PlainTorch(run, run.teacher.path, run.student.path, device)
    return {"plain torch": plain, "parts alone": Alone(plain)}


def in_turn(arms: dict, steps: int, run, device, clock=time.perf_counter):
    """(seconds of plain steps, seconds by part of watched steps) by arm: one of each a round, after one that does not count."""
    from tools.bench.step_parts import Stopwatch

    seconds, parts = defaultdict(list), defaultdict(list)
    data = batches(run, device)
    for number in range(2 * steps + 1):
        waited = Stopwatch(device, clock=clock)
        with waited.part("data"):
            micro_batches = next(data)
        for name, arm in arms.items():
            watch = Stopwatch(device, detailed=number % 2 == 0, clock=clock)
            start = watch.now()
            arm.step(micro_batches, watch)
            took = watch.now() - start
            if number and watch.detailed:
                parts[name].append(waited.seconds | watch.seconds | {"the rest": took - sum(watch.seconds.values())})
            elif number:
                seconds[name].append(took)
    return seconds, parts


def batches(run, device):
    import torch.distributed as dist

    from ted_scale.data.loader import Loader
    from ted_scale.data.stream import open_stream
    from ted_scale.models.inspection import inspect

    vocabulary = inspect("student.path", run.student.path).vocab_size
    settings = {"prefetch": run.data.prefetch, "micro_batch": run.train.micro_batch}
    settings["sequence_parallel"] = run.data.sequence_parallel
    loader = Loader(**settings, rank=dist.get_rank(), world=dist.get_world_size(), device=device)
    samples = run.train.tokens_per_step // run.data.seq_len
    return loader.steps(open_stream(run.data, run.seed, vocabulary), start=0, samples_per_step=samples)


def table(seconds: dict, parts: dict, tokens: int) -> list[str]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = []
    for name, median in medians.items():
        of_parts = defaultdict(list)
        for row in parts[name]:
            for part, value in row.items():
                of_parts[part].append(value)
        shown = ", ".join(f"{part} {statistics.median(values) * 1e3:.0f}" for part, values in of_parts.items())
        lines.append(f"{name}: {median * 1e3:.0f} ms, {tokens / median:.0f} tokens/s | ms: {shown}")
    return [*lines, *ratios(seconds)]


def ratios(seconds: dict) -> list[str]:
    """Of each arm's time to that of `kd` within a round; of plain torch's, it is the trainer's speed beside it."""
    others = [name for name in seconds if name != "kd"] if "kd" in seconds else []
    of_rounds = {f"{name} / kd": [x / y for x, y in zip(seconds[name], seconds["kd"], strict=True)] for name in others}
    for teacher in ("teacher alone", "teacher and its logits"):
        if {"kd", "ce", teacher} <= seconds.keys():
            each = zip(*(seconds[name] for name in ("kd", "ce", teacher)), strict=True)
            of_rounds[f"kd / ({teacher} + ce)"] = [kd / (ce + alone) for kd, ce, alone in each]
    return [
        f"{name} {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        for name, values in of_rounds.items()
    ]


if __name__ == "__main__":
    run_main(main)
