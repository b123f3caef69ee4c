"""What is compared: arms, seeds and a budget, from one TOML file. An arm is a run file plus the words that `--set` takes.

Note: arms must start from the same student, ask the same teacher and read the same data (conditions.py). What is meant to differ
all the same, as the student does when cuts are compared, is named in `differ`.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from ted_scale.base.errors import UserError, shown
from ted_scale.base.parsing import parse_toml
from ted_scale.base.shipped import found
from ted_scale.commands.comparison import conditions
from ted_scale.config.method import IN_TOKENS
from ted_scale.config.run import Run
from ted_scale.config.run_file import load_run, sentence
from ted_scale.config.types import Count, NonNegative, Positive, PositiveInt, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]
STEPS = ("train.steps", "train.epochs", "train.epochs_of")
OURS = ("name", "runs", "seed", *STEPS, "validation.every", "log_every", "resume.allow")
MOST_SEEDS = 10
STILL = 1e-9  # a learning rate


class Budget(Section):
    """What each arm may use, stage I included. Exactly one of tokens, seconds and steps is set."""

    tokens: PositiveInt | None = Field(None, description="read in training")
    seconds: Positive | None = Field(None, description="of steps and validation; starts do not count")
    steps: PositiveInt | None = Field(
        None, description="what so many steps of the arm `of` take; validation does not count"
    )
    of: str = Field("", description="the arm whose steps are the budget")

    @model_validator(mode="after")
    def one_is_set(self):
        given = [name for name in ("tokens", "seconds", "steps") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are" if given else "none is"
            raise ValueError(f"tokens, seconds or steps must be set, and only one of them, but {said}")
        if self.steps and not self.of:
            raise ValueError('of must name the arm whose steps are the budget, but is missing; add of = "ARM"')
        if self.of and not self.steps:
            raise ValueError(
                f"steps must be set beside of = {shown(self.of)}, but is missing; say how many of its steps"
            )
        return self

    @property
    def timed(self) -> bool:
        return self.tokens is None


class Measure(Section):
    """How a budget of seconds becomes steps: short runs of every arm, in turn."""

    steps: Annotated[int, Field(ge=3)] = Field(12, description="of each stage; the first counts as the second does")
    rounds: PositiveInt = 2


class Comparison(Section):
    run: str = Field(description="the run file that every arm starts from")
    folder: str = Field(description="where the arms' runs and the results are made")
    arms: dict[Name, list[str]] = Field(min_length=1, description="for each, its section.key=value words")
    budget: Budget
    programs: dict[Name, str] = Field(
        {}, description="for an arm that the trainer does not train: a program that takes the same words and leaves "
        "metrics.jsonl and life.json in the run's folder"
    )  # fmt: skip
    spent: dict[Name, NonNegative] = Field(
        {}, description="seconds of a timed budget that an arm used before its run, as for a student that was fitted to its teacher"
    )  # fmt: skip
    seeds: list[Count] = Field([0, 1, 2], min_length=1, max_length=MOST_SEEDS)
    judged_by: Literal["last", "least"] = Field(
        "last",
        description="which validation of a run counts; least: where many epochs overfit, and one would stop in time",
    )
    baseline: str = Field("", description="the arm that others are compared with; default: the first")
    set: list[str] = Field([], description="section.key=value words for every arm")
    differ: list[str] = Field([], description="keys of models and data that arms may set differently")
    ranks: PositiveInt = Field(1, description="of each run")
    at_once: PositiveInt = Field(1, description="runs at the same time; on GPUs each has devices of its own")
    validations: PositiveInt = Field(4, description="in a run, besides the one at its start")
    keep_checkpoints: bool = Field(True, description="false: a run's checkpoints go when its result is noted")
    measure: Measure = Measure()

    @model_validator(mode="after")
    def names_are_arms(self):
        named = {
            "baseline": [self.baseline],
            "budget.of": [self.budget.of],
            "programs": self.programs,
            "spent": self.spent,
        }
        for key, arm in ((key, arm) for key, names in named.items() for arm in names):
            if arm and arm not in self.arms:
                raise ValueError(f"{key} must be one of the arms {sorted(self.arms)}, but is {shown(arm)}")
        if self.spent and not self.budget.timed:
            raise ValueError("spent must be left out with a budget of tokens, which counts no seconds")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds must differ, but are {self.seeds}")
        return self

    @property
    def compared_with(self) -> str:
        return self.baseline or next(iter(self.arms))

    @property
    def place(self) -> Path:
        return Path(self.folder)


class Job(NamedTuple):
    """One run: an arm with a seed, or a short run that measures an arm's seconds."""

    name: str
    words: tuple[str, ...]  # for --set
    program: str  # of the arm; "" for ours


def load(path: str) -> Comparison:
    try:
        values = parse_toml(found(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"PLAN must name a readable file, but {path} is not: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} must be valid TOML, but is not: {' '.join(str(error).split())}") from None
    try:
        plan = Comparison.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {sentence(error, Comparison)}") from None
    refuse_unequal(plan)
    return plan


def refuse_unequal(plan: Comparison) -> None:
    """Also finds the mistakes of every arm's run file and words."""
    for arm, words in plan.arms.items():
        for word in (*plan.set, *words):
            key = word.partition("=")[0].strip()
            if conditions.named(key, OURS):
                raise UserError(f"arms.{arm} must not set {key}, because the comparison does; take it out of the plan")
        refuse_schedule_in_tokens(plan, arm)
    conditions.refuse_unequal(runs_of(plan), plan.compared_with, plan.differ, OURS)


def refuse_schedule_in_tokens(plan: Comparison, arm: str) -> None:
    """The short runs that measure a price would never get through it."""
    for term, weight in of_arm(plan, arm).terms.items() if plan.budget.timed else ():
        for key in IN_TOKENS:
            if getattr(weight, key, None):
                raise UserError(
                    f"arms.{arm} must have its loss.{term} in fractions with a budget of time, but has {key}, which the runs that "
                    "measure its price do not reach; leave it out, use on_after and off_after, or a budget of tokens"
                )


def of_arm(plan: Comparison, arm: str, *more: str) -> Run:
    """Without `more`: a budget of tokens decides the steps, so an arm has as many here as it could ever get."""
    enough = [f"train.steps={plan.budget.tokens}"] if plan.budget.tokens else []
    try:
        return load_run(plan.run, [*plan.set, *plan.arms[arm], *enough, *more])
    except UserError as error:
        raise UserError(f"arms.{arm}: {error}") from None


def runs_of(plan: Comparison) -> dict[str, Run]:
    return {arm: of_arm(plan, arm) for arm in plan.arms}


def job_of(plan: Comparison, arm: str, seed: int, steps: int) -> Job:
    every = validates_every(steps, stage_i_steps(of_arm(plan, arm)), plan.validations)
    own = [f"seed={seed}", f"train.steps={steps}", f"validation.every={every}", f"log_every={max(1, steps // 20)}"]
    return job_with(plan, arm, name_of(arm, seed), own)


def validates_every(steps: int, stage_i: int, most: int) -> int:
    """As often as `most` validations allow, the last one among them: the budget pays for no more."""
    total, every = stage_i + steps, max(1, steps // (most + 1))
    while total // every - stage_i // every + (total % every > 0) > most:
        every += 1
    return every


def name_of(arm: str, seed: int) -> str:
    return f"{arm}_seed{seed}"


def measuring_job(plan: Comparison, arm: str, turn: int) -> Job:
    """It hardly learns: a step costs the same at any rate, and an arm that diverges shall do so in runs of its own."""
    run, steps = of_arm(plan, arm), plan.measure.steps
    stage_i = [f"filters.steps={steps}"] if stage_i_steps(run) else []
    still = ["train.warmup_steps=0", "train.min_lr=0", f"train.lr={STILL}"]
    still += [f"filters.lr={STILL}"] if run.filters.lr else []  # frozen ones cost less
    own = [f"train.steps={steps}", *still, "validation.every=0", "log_every=1", *stage_i]
    return job_with(plan, arm, f"measure_{arm}_{turn}", own)


def job_with(plan: Comparison, arm: str, name: str, own: list[str]) -> Job:
    """The comparison's own words come last, so that nothing replaces them."""
    own = [*without_best(of_arm(plan, arm)), *place_of(plan, name), *own]
    words = (*plan.set, *plan.arms[arm], *own)
    return Job(name, words, plan.programs.get(arm, ""))


def place_of(plan: Comparison, name: str) -> list[str]:
    """A folder of the comparison's own: the run file's may hold checkpoints of another method."""
    return [f"name={name}", f"runs={plan.place / 'runs'}"]


def without_best(run: Run) -> list[str]:
    """The comparison says when a run validates, and what is best must be of a saved step. One word has all of the section, because
    none takes `best_is` out of it."""
    kept = run.checkpoint.model_dump(exclude={"best", "best_is"})
    inside = ", ".join(f"{key}={json.dumps(value)}" for key, value in kept.items())
    return [f"checkpoint={{{inside}}}"] if run.checkpoint.best else []


def stage_i_steps(run: Run) -> int:
    from ted_scale.distill.stages import stages_of  # imports torch: a mistake in a plan should not wait for it

    return sum(stage.steps for stage in stages_of(run) if stage.learns_filters)
