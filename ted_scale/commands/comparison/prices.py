"""What an arm's steps cost in seconds, and how many of them a budget holds. Stage I and validation are paid from the budget.

Note: prices are measured in runs of all arms in turn, as many at once as in the comparison, because a machine's speed changes
with what else runs on it and from hour to hour.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.durable import write_durably
from ted_scale.base.errors import UserError
from ted_scale.checkpoints import life
from ted_scale.commands.comparison import plan as plans
from ted_scale.commands.comparison.plan import Comparison
from ted_scale.metrics.rows import rows_in


class Price(NamedTuple):
    """What a step or a validation of an arm takes, in seconds."""

    filter_step: float  # of stage I; 0 where there is none
    step: float
    validation: float
    first_validation: float  # the teacher reads the text, too


def words_file(plan: Comparison, job: plans.Job) -> Path:
    return plan.place / "said" / f"{job.name}.words.json"


def note_over(plan: Comparison, job: plans.Job) -> None:
    words_file(plan, job).parent.mkdir(parents=True, exist_ok=True)
    write_durably(words_file(plan, job), json.dumps([job.program, *job.words]))


def is_over(plan: Comparison, arm: str, job: plans.Job) -> bool:
    """Whether a measuring run of these steps and these words is over: the plan may have been edited since."""
    steps, last, said = plan.measure.steps, life.read(plan.place / "runs" / job.name), words_file(plan, job)
    all_steps = steps * (2 if plans.stage_i_steps(plans.of_arm(plan, arm)) else 1)
    done = last is not None and (last.step, last.words) == (all_steps, life.DONE)
    return done and said.is_file() and json.loads(said.read_text()) == [job.program, *job.words]


def price_of(plan: Comparison, arm: str, name: str) -> Price:
    """From a measuring run that is over. Its loss schedules are those of a whole run, so each part of them has its share, if it is
    not shorter than two steps; the first step of a stage compiles and fills caches, so the second one is counted twice."""
    folder, run = plan.place / "runs" / name, plans.of_arm(plan, arm)
    timed = [row for row in rows_in(folder / "metrics.jsonl") if "perf/step_ms" in row]
    first = plan.measure.steps if plans.stage_i_steps(run) else 0
    stage_i = [row["perf/step_ms"] / 1e3 for row in timed if row["step"] <= first]
    stage_ii = [row["perf/step_ms"] / 1e3 for row in timed if row["step"] > first]
    of_i, of_ii = (statistics.mean([stage[1], *stage[1:]]) if stage else 0.0 for stage in (stage_i, stage_ii))
    return Price(of_i, of_ii, *validations_of(timed, life.read(folder).spent))


def validations_of(timed: list[dict], spent: life.Spent) -> tuple[float, float]:
    """(seconds of the last one, of the one before the first step). The last row of steps comes between them, and says how the time
    until then was shared. Without such shares both count as their mean."""
    shares = timed[-1]
    if not shares.get("perf/goodput"):
        return spent.validation / 2, spent.validation / 2
    first = min(spent.validation, shares["perf/lost_validation"] / shares["perf/goodput"] * spent.steps)
    return spent.validation - first, first


def middle(prices: list[Price]) -> Price:
    return Price(*(statistics.median(column) for column in zip(*prices, strict=True)))


def note(plan: Comparison, prices: dict[str, Price]) -> None:
    values = {arm: price._asdict() for arm, price in prices.items()}
    write_durably(plan.place / "prices.json", json.dumps(values, indent=1) + "\n")


def noted(plan: Comparison) -> dict[str, Price]:
    path = plan.place / "prices.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    every = {arm: {"first_validation": values["validation"], **values} for arm, values in known.items()}  # older files
    return {arm: Price(**values) for arm, values in every.items() if arm in plan.arms}


def steps_within(plan: Comparison, arm: str, known: dict[str, Price]) -> int:
    """Steps of stage II that the budget holds."""
    run, budget = plans.of_arm(plan, arm), plan.budget
    stage_i, spent = plans.stage_i_steps(run), plan.spent.get(arm, 0.0)
    if budget.tokens:
        steps, kind = budget.tokens // run.train.tokens_per_step - stage_i, f"tokens ({budget.tokens:,})"
    elif budget.seconds:
        price = known[arm]
        validated = price.first_validation + plan.validations * price.validation
        left = budget.seconds - spent - stage_i * price.filter_step - validated
        steps, kind = int(left / price.step), f"seconds ({budget.seconds:,.0f})"
    else:
        left = budget.steps * known[budget.of].step - spent - stage_i * known[arm].filter_step
        rounding = 1e-6  # so that the arm `of` itself gets its steps
        steps, kind = int(left / known[arm].step + rounding), f"steps ({budget.steps:,} of arms.{budget.of})"
    if steps < 1:
        raise UserError(
            f"budget.{kind} must hold a step of arms.{arm} after its {stage_i} steps of stage I"
            f"{f' and the {spent:g} s of spent.{arm}' if spent else ''}, but does not; raise it"
        )
    return steps


def seconds_at(plan: Comparison, arm: str, price: Price | None, run, step: int, validations: int) -> float | None:
    """What a run has used of its budget by this step of its own count and so many validations; None where nothing was measured."""
    if price is None:
        return None
    stage_i = min(step, plans.stage_i_steps(run))
    validated = price.first_validation + (validations - 1) * price.validation
    paid = 0.0 if plan.budget.steps or not validations else validated
    return plan.spent.get(arm, 0.0) + stage_i * price.filter_step + (step - stage_i) * price.step + paid
