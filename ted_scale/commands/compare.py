"""Compare arms under equal conditions: ted-scale compare PLAN.toml

Every arm is one run file plus `--set` words, with each seed, on the same start and the same data, within a budget of tokens or
of seconds; stage I and validation count. Results are in the plan's folder: table.md, curves.csv, curves.png. A comparison that
was interrupted goes on where it was when the same command is given again, and repeats no finished run.
docs/comparing.md has the keys of a plan.
"""

import argparse
import contextlib
import functools
import shutil
import signal
import subprocess

import ted_scale
from ted_scale.base import shipped
from ted_scale.base.durable import write_durably
from ted_scale.base.errors import DONE, NUMBERS, RunStopped, UserError, shown
from ted_scale.base.exits import run_main
from ted_scale.base.parsing import parse_toml
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import life
from ted_scale.commands.comparison import plan as plans
from ted_scale.commands.comparison import prices, results, starts
from ted_scale.commands.comparison.plan import Comparison, Job
from ted_scale.commands.comparison.prices import Price
from ted_scale.commands.comparison.results import Point, Result
from ted_scale.metrics.rows import rows_in


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", metavar="PLAN.toml")
    parser.add_argument(
        "--table", action="store_true", help="only write the results of what has been run, and print them"
    )
    arguments = parser.parse_args(argv)
    plan = plans.load(arguments.plan)
    if not arguments.table:
        refuse_mistakes(plan)
        with either_signal_interrupts():
            compare(plan)
    print(write_results(plan))


@contextlib.contextmanager
def either_signal_interrupts():
    """A shell has what it starts in the background ignore SIGINT; SIGTERM alone would leave the runs that go on."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_mistakes(plan: Comparison) -> None:
    """What a run would refuse at its start is refused here, before any has begun."""
    from ted_scale.forecast.placement import needed
    from ted_scale.plan import make_plan

    for arm, program in plan.programs.items():
        if not shipped.found(program).is_file():
            raise UserError(
                f"programs.{arm} must be a file, from this folder or the repository's root on, but {shown(program)} is none; "
                "correct its path"
            )
    most = 0.0
    for arm in plan.arms:
        steps = prices.steps_within(plan, arm, {}) if plan.budget.tokens else 0
        job = plans.job_of(plan, arm, plan.seeds[0], steps) if steps else plans.measuring_job(plan, arm, 0)
        plans.of_arm(plan, arm, *job.words)  # the comparison's own words, too, must be what a run takes
        try:
            place = plans.place_of(plan, plans.name_of(arm, plan.seeds[0]))
            run = plans.of_arm(plan, arm, *place, *([f"train.steps={steps}"] if steps else []))
            most = max(most, needed(make_plan(run, world=plan.ranks), "cpu"))
        except UserError as error:
            raise UserError(f"arms.{arm}: {error}") from None
    starts.refuse_crowd(plan, most)


def compare(plan: Comparison) -> None:
    plan.place.mkdir(parents=True, exist_ok=True)
    commit()
    known = measured(plan) if plan.budget.timed else {}
    steps = {arm: prices.steps_within(plan, arm, known) for arm in plan.arms}
    refuse_other_steps(plan, steps)
    over = {(result.arm, result.seed) for result in results.noted(plan)}
    # By seeds first: an interrupted comparison has whole pairs.
    todo = [(arm, seed) for seed in plan.seeds for arm in plan.arms if (arm, seed) not in over]
    jobs = {plans.job_of(plan, arm, seed, steps[arm]): (arm, seed) for arm, seed in todo}
    for job, code in starts.run_all(plan, list(jobs)):
        arm, seed = jobs[job]
        result = result_of(plan, arm, seed, steps[arm], known.get(arm), job, code)
        results.note(plan, result)
        if not plan.keep_checkpoints:
            shutil.rmtree(files.checkpoints_of(plan.place / "runs" / job.name), ignore_errors=True)
        print(f"{job.name}: {result.end}, val/loss {result.points[-1].loss:.4f}" if result.points else
              f"{job.name}: {result.end}", flush=True)  # fmt: skip


def measured(plan: Comparison) -> dict[str, Price]:
    """What was measured before stays, so that a comparison that goes on has the steps with which it began."""
    known = prices.noted(plan)
    turns = [(arm, turn) for turn in range(plan.measure.rounds) for arm in plan.arms if arm not in known]
    jobs = {plans.measuring_job(plan, arm, turn): arm for arm, turn in turns}
    todo = [job for job in jobs if not prices.is_over(plan, jobs[job], job)]
    for job in todo:  # an interrupted one measured only a part
        shutil.rmtree(plan.place / "runs" / job.name, ignore_errors=True)
    for job, code in starts.run_all(plan, todo):
        if code != DONE:
            raise failed(plan, job, code)
        prices.note_over(plan, job)
    for job in jobs:
        shutil.rmtree(files.checkpoints_of(plan.place / "runs" / job.name), ignore_errors=True)
    found: dict[str, list[Price]] = {}
    for job, arm in jobs.items():
        found.setdefault(arm, []).append(prices.price_of(plan, arm, job.name))
    known |= {arm: prices.middle(of_arm) for arm, of_arm in found.items()}
    prices.note(plan, known)
    for arm, price in known.items():
        print(f"{arm}: {price.step:.3f} s a step, {price.filter_step:.3f} s one of stage I, {price.validation:.1f} s a "
              "validation", flush=True)  # fmt: skip
    return known


def refuse_other_steps(plan: Comparison, steps: dict[str, int]) -> None:
    for result in results.noted(plan):
        if result.steps != steps[result.arm]:
            raise UserError(
                f"{plan.place} must have results of this budget, but {result.arm}_seed{result.seed} took {result.steps} steps "
                f"and not {steps[result.arm]}; give the plan another folder"
            )
    for arm, seed in ((arm, seed) for arm in plan.arms for seed in plan.seeds):
        path = plan.place / "runs" / f"{arm}_seed{seed}" / "run.toml"
        begun = parse_toml(path.read_text(encoding="utf-8"))["train"]["steps"] if path.exists() else steps[arm]
        if begun != steps[arm]:
            raise UserError(
                f"{path.parent} must be a run of this budget, but was begun with {begun} steps and not {steps[arm]}: its schedules "
                "would be of both; remove it, or give the plan another folder"
            )


def result_of(plan: Comparison, arm: str, seed: int, steps: int, price: Price | None, job: Job, code: int) -> Result:
    if code not in (DONE, NUMBERS):
        raise failed(plan, job, code)
    folder, run = plan.place / "runs" / job.name, plans.of_arm(plan, arm, *job.words)
    rows = [row for row in rows_in(folder / "metrics.jsonl") if row.get("val/loss") is not None]
    points = [
        Point(row["step"], row["tokens"], prices.seconds_at(plan, arm, price, run, row["step"], n), row["val/loss"])
        for n, row in enumerate(rows)
    ]
    last = life.read(folder)
    end = "done" if code == DONE else f"diverged: {last.words}"
    return Result(arm, seed, steps, end, last.spent.steps + last.spent.validation, commit(), points)


def failed(plan: Comparison, job: Job, code: int) -> RunStopped:
    """Not the arm's numbers: the machine, or a fault. The same command goes on after it."""
    said = plan.place / "said" / f"{job.name}.txt"
    return RunStopped(f"{job.name} ended with exit code {code}; look into {said}, then give the same command again")


@functools.cache
def commit() -> str:
    """The one that the comparison was started with: its code is what has been loaded. A wheel's is its version."""
    if not (shipped.HOME / ".git").exists():
        return ted_scale.__version__
    command = ["git", "-C", str(shipped.HOME), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write_results(plan: Comparison) -> str:
    found = results.noted(plan)
    if not found:
        return f"{plan.place} has no results yet"
    table = results.table(plan, found)
    write_durably(plan.place / "table.md", table)
    write_durably(plan.place / "curves.csv", results.curves(found))
    drawn = results.draw(plan, found, plan.place / "curves.png")
    return table + (
        "" if drawn else "there is no picture: `pip install matplotlib` and give the command with --table\n"
    )


if __name__ == "__main__":
    run_main(main)
