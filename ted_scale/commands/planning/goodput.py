"""How much of its time a run spends on steps that count, and which checkpoint.every is best, by simulation: docs/goodput.md.

    ted-scale goodput                                                     # the table of docs/goodput.md
    ted-scale goodput --params 7 --gpus 512 --mtbf-hours 50000 --step-s 4

A failure ends the run; the supervisor restarts it after a pause, which grows while no newer checkpoint comes. Failures come
at any moment with the same probability, also while the run starts again. Note: a checkpoint counts from the moment when it is
published, and holds the steps from before its write began.
"""

import argparse
import math
from typing import NamedTuple

import numpy as np

STATE, WEIGHTS = 12, 2  # bytes a parameter: fp32 weight and both moments; bf16 weight
ROOM = 60e9  # bytes of a GPU of 80 GB for states, gradients and weights; the rest is for activations
ROUND = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
EVERY = [*range(1, 10), *(number * 10**power for power in range(6) for number in ROUND)]  # the steps that are tried


class Costs(NamedTuple):
    """The costs of a failure and of a save, all in seconds."""

    mtbf: float  # of the whole run
    step: float
    stall: float  # of a step that is saved
    write: float  # from the end of the stall until the checkpoint is published
    detect: float
    pause: float
    longest_pause: float
    start: float  # of the processes, with loading


class Shares(NamedTuple):
    """Of the whole time; their sum is 1."""

    goodput: float
    stalls: float
    replay: float
    start: float
    down: float  # detection and pause


def simulate(costs: Costs, every: int, *, runs: int = 1000, failures: int = 24, seed: int = 0) -> Shares:
    """Runs side by side, each until so many failures."""
    draws, spent, idle = np.random.default_rng(seed), np.zeros(5), np.zeros(runs)
    period, saved_work = every * costs.step + costs.stall, every * costs.step
    for _ in range(failures):
        lived = draws.exponential(costs.mtbf, runs)  # from the start of the processes to the next failure
        pause = np.minimum(costs.longest_pause, costs.pause * 2**idle) * draws.uniform(0.75, 1.25, runs)
        trained = np.maximum(0.0, lived - costs.start)
        saved = np.floor(np.maximum(0.0, trained - costs.write) / period) * saved_work
        stalls = np.floor(trained / period) * costs.stall
        idle = np.where(saved > 0, 0, np.minimum(idle + 1, 30))
        parts = saved, stalls, trained - stalls - saved, np.minimum(lived, costs.start), costs.detect + pause
        spent += [part.sum() for part in parts]
    return Shares(*map(float, spent / spent.sum()))


def best(costs: Costs) -> tuple[int, Shares]:
    """(checkpoint.every, its shares). A save may not begin before the one before is written."""
    at_least = costs.write / costs.step
    scores = {
        every: simulate(costs, every) for every in EVERY if at_least <= every <= at_least + costs.mtbf / costs.step
    }
    every = max(scores, key=lambda key: scores[key].goodput)
    return every, scores[every]


def costs_of(params: float, gpus: int, flags, trained: float | None = None) -> Costs:
    """For `params` of the student, of which a checkpoint has those that are trained: all by default."""
    state, read = STATE * (trained or params), WEIGHTS * params * (1 + flags.teacher)
    write = rate(flags.disk_gbps, gpus, flags.store_gbps)
    load = rate(flags.load_gbps, gpus, flags.store_gbps)
    return Costs(
        mtbf=flags.mtbf_hours * 3600 / gpus, step=flags.step_s, stall=state / (gpus * flags.copy_gbps * 1e9), write=state / write,
        detect=flags.detect_s, pause=flags.pause_s, longest_pause=max(600.0, flags.pause_s),
        start=flags.start_s + (2 * state + read) / load,  # verified, then loaded
    )  # fmt: skip


def rate(gbps: float, gpus: int, most: float) -> float:
    return min(gbps * gpus, most) * 1e9


def fits(params: float, gpus: int, teacher: float) -> bool:
    return params * (STATE + 2 * WEIGHTS + 2 + WEIGHTS * teacher) / gpus <= ROOM


HEAD = (
    "student", "GPUs", "a failure every", "best `checkpoint.every`", "goodput", "stalls", "repeated", "start", "down",
    "goodput at {} steps",
)  # fmt: skip


def table(flags) -> str:
    rows = [[name.format(f"{flags.every:,}") for name in HEAD], ["---:"] * len(HEAD)]
    for params in flags.params:
        for gpus in flags.gpus:
            if fits(params * 1e9, gpus, flags.teacher):
                rows.append(row(params, gpus, costs_of(params * 1e9, gpus, flags), flags.every))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(params: float, gpus: int, costs: Costs, every: int) -> list[str]:
    steps, shares = best(costs)
    given = simulate(costs, max(every, math.ceil(costs.write / costs.step)))
    return [
        f"{params:g}B", f"{gpus:,}", f"{costs.mtbf / 3600:,.1f} h", f"{steps:,} ({steps * costs.step / 60:,.1f} min)",
        *(f"{share:.2%}" for share in shares), f"{given.goodput:.2%}",
    ]  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    say = parser.add_argument
    say("--params", type=float, nargs="+", default=[1, 7, 30, 70], help="of the student, in billions")
    say("--teacher", type=float, default=5.0, help="the teacher's parameters / the student's")
    say("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024], help="also the number of ranks")
    say("--mtbf-hours", type=float, default=50_676, help="of one GPU with its share of the rest; default: Llama 3's")
    say("--step-s", type=float, default=10.0)
    say("--every", type=int, default=1000, help="a checkpoint.every to compare with; 1,000 is the default of a run")
    say("--copy-gbps", type=float, default=4.6, help="GB/s of a rank into host memory")
    say("--disk-gbps", type=float, default=0.35, help="GB/s of a rank to disk, with digests")
    say("--load-gbps", type=float, default=1.0, help="GB/s of a rank from disk, with digests")
    say("--store-gbps", type=float, default=50.0, help="GB/s of all ranks together")
    say("--detect-s", type=float, default=30.0, help="from a failure to the exit of all ranks")
    say("--pause-s", type=float, default=10.0, help="of ted-scale supervise")
    say(
        "--start-s",
        type=float,
        default=120.0,
        help="from the start of the processes to the first step, without loading",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    print(table(parse(argv)))


if __name__ == "__main__":
    main()
