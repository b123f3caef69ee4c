"""A rank that measures a step with the teacher in every place, and calibrates a plan beside: `places_in_turn.py RUN OUT ROUNDS`.

Steps and probes take turns, so that other work on the machine slows all of them alike. Rank 0 writes OUT: of each place the
milliseconds and the mebibytes received of a step, and what the plan says of both. Note: bytes are the kernel's count of this node's
eth0, with TCP's headers and everything else that ranks send.
"""

import json
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from ted_scale.commands.planning.calibrate import actions as probes
from ted_scale.commands.planning.calibrate import machine_from
from ted_scale.config.run_file import load_run
from ted_scale.distill.memory import bytes_of
from ted_scale.distill.trained import trained_parameters
from ted_scale.engines import build_student, build_teacher
from ted_scale.forecast import step, traffic
from ted_scale.plan import make_plan
from ted_scale.ranks.group import start_ranks
from tools.bench.step import TrainerArm, batches
from tools.bench.step_parts import Stopwatch

WAYS = {"sharded": {"placement": "sharded"}, "replicated": {"placement": "replicated"},
        "node": {"placement": "node", "node_ranks": 1}}  # fmt: skip
WARM_UP = 2


def main() -> None:
    config, out, count = sys.argv[-3:]
    run, device = load_run(config), start_ranks()
    plans = {name: planned(run, name) for name in WAYS}
    arms = {name: arm(plan, device) for name, plan in plans.items()}
    actions = probes(plans["sharded"], device)
    seconds, received = in_turn(actions, arms, batches(run, device), device, int(count))
    machine = machine_from(plans["sharded"], device, {name: statistics.median(seconds[name]) for name in actions})
    if dist.get_rank() == 0:
        ways = {name: result(plan, machine, seconds[name], received[name]) for name, plan in plans.items()}
        Path(out).write_text(json.dumps({"link": machine.far_link * 8 / 1e6, "latency": machine.latency * 1e3, **ways}))
    dist.barrier()


def planned(run, name: str):
    teacher = run.teacher.model_copy(update=WAYS[name])
    return make_plan(run.model_copy(update={"name": name, "teacher": teacher}), dist.get_world_size())


def arm(plan, device) -> TrainerArm:
    teacher, stage = build_teacher(plan), plan.stages[-1]
    return TrainerArm(plan, stage, build_student(plan, stage, teacher, plan.filters_file), teacher, device)


def in_turn(actions: dict, arms: dict, data, device, count: int):
    """(seconds, bytes received) by name, in each round that counts."""
    seconds = {name: [] for name in (*actions, *arms)}
    received = {name: [] for name in seconds}
    for number in range(WARM_UP + count):
        micro_batches = next(data)
        steps = {name: partial(each.step, micro_batches, Stopwatch(device)) for name, each in arms.items()}
        for name, action in {**actions, **steps}.items():
            dist.barrier()
            before, begin = bytes_of_node(), time.perf_counter()
            action()
            took, came = time.perf_counter() - begin, bytes_of_node() - before
            if number >= WARM_UP:
                seconds[name].append(took)
                received[name].append(came)
    return seconds, received


def bytes_of_node() -> int:
    return int(re.search(r"eth0:\s*(\d+)", Path("/proc/net/dev").read_text())[1])


def result(plan, machine, seconds: list[float], received: list[int]) -> dict[str, float]:
    stage = plan.stages[-1]
    time_planned = sum(step.of_stage(plan, stage, machine, local=1).values())
    b, trained = bytes_of(plan), trained_parameters(plan, stage)
    sent = [traffic.teacher_gathers(plan, b), traffic.student_gathers(plan, stage, b, "cpu")]
    sent.append(traffic.as_received(traffic.reduction(plan, stage, trained, "cpu"), "cpu"))
    half = plan.accumulation * sum(each.bytes for each in sent) / 2  # of two nodes each receives the other's half
    return {
        "ms": statistics.median(seconds) * 1e3, "least_ms": min(seconds) * 1e3, "planned_ms": time_planned * 1e3,
        "mib": statistics.median(received) / 2**20, "planned_mib": half / 2**20,
    }  # fmt: skip


if __name__ == "__main__":
    main()
