"""The operation of a run: checkpoints, health, time limits, Weights & Biases."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ted_scale.config import changes
from ted_scale.config.types import Count, PositiveInt, Seconds, Section

FALLING = ("loss", "ppl", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score")
RISING = ("acc", "exact_match", "em", "f1", "mcc", "bleu", "rouge1", "rouge2", "rougeL")


class Checkpoint(Section):
    every: PositiveInt = Field(1000, description="steps")
    keep: PositiveInt = Field(2, description="how many of the last checkpoints stay")
    keep_every: Annotated[int, Field(ge=0)] = Field(
        0, description="checkpoints whose step is a multiple of this stay for ever; 0: none"
    )
    keep_best: bool = Field(False, description="the one with the lowest validation loss of its step stays")
    best: Annotated[str, Field(pattern=r"^(val/\S+)?$")] = Field(
        "",
        description="the one that is best by this number of metrics.jsonl, as val/loss or val/suite/boolq/acc, stays, and "
        "ted-scale export finds it; docs/checkpoints.md",
    )
    best_is: Literal["lowest", "highest"] | None = Field(
        None, description="which value of it is best; default: as known of losses, perplexities and the usual scores"
    )
    background: bool = Field(True, description="false: a step waits until its checkpoint is on disk")
    max_failed: PositiveInt = Field(3, description="saves in a row that may fail; the next one ends the run")
    copy_to: Annotated[str, Field(pattern=r"^(s3://[^/]+.*)?$")] = Field(
        "",
        description="s3://BUCKET/PREFIX for a copy of every checkpoint; a run that has lost its folder continues from it",
    )

    @property
    def judged_by(self) -> str:
        """The number that checkpoints are compared by; "" if none is."""
        return self.best or ("val/loss" if self.keep_best else "")

    @property
    def lowest_is_best(self) -> bool:
        return (self.best_is or known_best(self.judged_by)) == "lowest"

    @model_validator(mode="after")
    def best_is_known(self):
        if self.best and not (self.best_is or known_best(self.best)):
            raise ValueError(
                f"best_is must be set where it is not known which value of checkpoint.best is best, but is missing for "
                f"'{self.best}'; set 'lowest' or 'highest'"
            )
        if self.best_is and not self.best:
            raise ValueError(
                f"best_is must be left out without checkpoint.best, but is '{self.best_is}'; set best, too"
            )
        if self.keep_best and self.best not in ("", "val/loss"):
            raise ValueError(
                f"keep_best must be left out where checkpoint.best is another number than val/loss, but is true and best is "
                f"'{self.best}'; one checkpoint is the best"
            )
        return self


def known_best(number: str) -> str | None:
    """By the last part of its name, which lm-eval may end with the name of a filter: exact_match_strict-match."""
    metric = number.rpartition("/")[2]
    of = {"lowest": FALLING, "highest": RISING}
    known = [
        best for best, names in of.items() if any(metric == name or metric.startswith(f"{name}_") for name in names)
    ]
    return known[0] if known else None


class Resume(Section):
    """How a run continues from a checkpoint of another run file."""

    allow: list[str] = Field([], description='keys that may differ although they decide the result; as ["train.betas"]')

    @model_validator(mode="after")
    def names_are_known(self):
        for name in self.allow:
            if (hint := changes.unknown_name(name)) is not None:
                raise ValueError(f"allow must name keys that decide the result, but has '{name}'; {hint}")
        return self


class Health(Section):
    """What a run does when its numbers are bad; docs/health.md."""

    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite; skip: drop the step's update, count it and continue"
    )
    max_skipped: PositiveInt = Field(10, description="steps in a row that may be dropped; the next one stops the run")
    max_skipped_all: PositiveInt = Field(100, description="steps of the whole run that may be dropped")
    on_spike: Literal["alert", "rewind", "off"] = Field(
        "alert", description="rewind: load the last good checkpoint, and continue with samples not yet read"
    )
    spike_factor: Annotated[float, Field(gt=1)] = Field(
        1.5,
        description="a spike is a loss/total (with teacher.every > 1: a loss/ce) above this many medians of the steps before it",
    )
    spike_window: Annotated[int, Field(ge=4)] = Field(
        128, description="steps of that median; the check begins when a quarter of them was taken"
    )
    max_rewinds: PositiveInt = Field(3, description="rewinds without a step past the spike; the next one stops the run")
    replicas_every: Annotated[int, Field(ge=0)] = Field(
        0,
        description="steps between comparisons of the bits that must be equal on all ranks, also before each save; 0: never",
    )


class Vitals(Section):
    """The health of the distillation, from samples of tokens; docs/vitals.md."""

    every: Annotated[int, Field(ge=0)] = Field(
        100, description="steps in which rank 0 measures each matched pair and the output once; 0: never"
    )


class Limits(Section):
    """Anything that takes longer ends the run with a reason, because a cluster often runs unwatched."""

    step_s: Seconds = Field(1800.0, description="a step, a batch of validation, a checkpoint")
    start_s: Seconds = Field(
        3600.0,
        description="start-up, a rewind, a stage's first step, which compiles: without a byte read by any rank; at least step_s",
    )
    silence_s: Annotated[Seconds, Field(ge=3)] = Field(
        20.0,
        description="a rank without a sign of life counts as dead; DeepSpeed's launcher kills the others after 30 s",
    )

    @property
    def longest_s(self) -> float:
        return max(self.step_s, self.start_s)


class Samples(Section):
    """Text that student and teacher write in training: runs/NAME/samples.jsonl; docs/reading_a_run.md."""

    every: Count = Field(0, description="steps of stage II; also before its first and after its last one; 0: never")
    prompts: Annotated[list[str], Field(max_length=64)] = Field([], description="each is gone on with")
    from_validation: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="so many beginnings of held-out text are prompts, too"
    )
    tokens: PositiveInt = Field(64, description="after each prompt, the likeliest one each time")

    @model_validator(mode="after")
    def something_is_asked(self):
        if self.every and not (self.prompts or self.from_validation):
            raise ValueError("every must be 0 without prompts, but is above; give prompts, or set from_validation")
        return self


class Report(Section):
    """runs/NAME/report.html, written by a process of its own; docs/report.md."""

    every_minutes: Annotated[float, Field(ge=0, le=1e5)] = Field(
        0.0, description="rank 0 has the page written so often, and at the end, when W&B gets it, too; 0: never"
    )


class Wandb(Section):
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")] = Field(description="where W&B shows the run")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="auto: online with an API key, else offline; online: the same, but --dry-run warns if there is no key; "
        "disabled: as without this section",
    )
    entity: str | None = Field(None, description="user or team; default: that of the key")
    group: str | None = Field(None, description="runs that W&B shows together; default: the run's name")
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field([], description="to find the run by")
    notes: str | None = Field(None, description="shown beside the run")
