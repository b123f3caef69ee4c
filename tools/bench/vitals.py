"""What vitals and logging cost of a step: the process's CPU time inside each, as a share of that of the steps of the same run.

A run of `ted` measures one item a step (a pair, or a part of the output), with a row of metrics each step. The share at an interval
of n steps is the cost of all items over n steps, and what a step without any pays. Note: CPU time does not see who else uses the
machine.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ted_scale.base.exits import run_main
from ted_scale.config.run_file import load_run

PART = "a part of the output"
METHODS = ("begin", "open", "watch", "pair", "output", "send", "read")


class Spent:
    """CPU seconds of the step by what they were for; what is called inside another is a part of it."""

    def __init__(self):
        self.seconds, self.inside = defaultdict(float), False

    def around(self, owner, name: str, what: str):
        original = getattr(owner, name)

        def timed(*arguments, **named):
            if self.inside:
                return original(*arguments, **named)
            self.inside, start = True, time.process_time()
            try:
                return original(*arguments, **named)
            finally:
                self.inside = False
                self.seconds[what] += time.process_time() - start

        return replaced(owner, name, timed)


@contextmanager
def replaced(owner, name: str, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=2, help="times that each item is measured")
    parser.add_argument("--every", type=int, nargs="+", default=[10, 50, 100, 200])
    arguments = parser.parse_args()
    run = load_run(arguments.config, [*arguments.set, "method=ted", "log_every=1", "filters.steps=0"])
    report(*measure(run, arguments.rounds), arguments.every)


def measure(run, rounds: int):
    """(CPU seconds of each step without vitals and logging, of logging, and of vitals by item)"""
    import torch

    from ted_scale.metrics.metrics import Metrics
    from ted_scale.ranks.group import start_ranks
    from ted_scale.vitals import pairs
    from ted_scale.vitals.vitals import Sample, Vitals
    from tools.bench.step_parts import Stopwatch

    device = start_ranks()
    torch.set_num_threads(1)
    spent, steps, logging, items = Spent(), [], [], defaultdict(list)
    with ExitStack() as stack:
        for owner, names, what in (
            (Vitals, METHODS, "vitals"), (Sample, ["of"], "vitals"), (pairs, ["pull"], "vitals"), (Metrics, ["add"], "logging"),
        ):  # fmt: skip
            for name in names:
                stack.enter_context(spent.around(owner, name, what))
        arm, data = trainer(run, device)
        vitals = arm.engine.module.vitals
        count = len(vitals.items)
        vitals.run = run.model_copy(update={"vitals": run.vitals.model_copy(update={"every": count + 1})})
        for number in range(rounds * (count + 1) + 1):
            micro_batches = next(data)
            spent.seconds.clear()
            start = time.process_time()
            arm.step(micro_batches, Stopwatch(device))
            took = time.process_time() - start
            if number:  # the first is the start of everything
                steps.append(took - sum(spent.seconds.values()))
                logging.append(spent.seconds["logging"])
                items[measured(vitals)].append(spent.seconds["vitals"])
    return steps, logging, items, count


def measured(vitals) -> str:
    return "a pair" if vitals.found else "nothing" if vitals.sums is None else PART


def trainer(run, device):
    """(the trainer, its micro-batches)"""
    from ted_scale.engines import build_student, build_teacher
    from ted_scale.metrics.metrics import Metrics
    from ted_scale.plan import make_plan
    from tools.bench.step import TrainerArm, batches

    plan = make_plan(run, 1)
    teacher = build_teacher(plan)
    arm = TrainerArm(plan, plan.stages[-1], build_student(plan, plan.stages[-1], teacher, None), teacher, device)
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = {"total_steps": arm.stage.last_step, "step": 0, "device": device, "wandb_run": None}
    arm.numbers = Metrics(run, writes=True, **settings)
    return arm, batches(run, device)


def report(steps, logging, items, count: int, intervals: list[int]) -> None:
    from ted_scale.vitals.vitals import PARTS

    each, pairs = statistics.median(steps), count - PARTS
    print(f"a step: {each:.3f} s of CPU time in the median of {len(steps)}, {pairs} pairs; shares of it:")
    mean = {name: statistics.mean(values) for name, values in items.items()}
    for name, value in mean.items():
        print(
            f"  vitals, a step that measures {name}: {value / each:.3%} ({value * 1e3:.2f} ms in the mean, "
            f"{max(items[name]) * 1e3:.2f} at most, {len(items[name])} times)"
        )
    log = statistics.mean(logging)
    print(f"  logging, a row each step, vitals off: {log / each:.3%} ({log * 1e3:.2f} ms)")
    once = pairs * mean["a pair"] + PARTS * mean[PART]
    for every in intervals:
        share = once / every / each + mean["nothing"] / each
        print(f"  vitals.every = {every}: vitals {share:.3%}, with logging {share + log / each:.3%}")


if __name__ == "__main__":
    run_main(main)
