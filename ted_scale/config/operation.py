"""The operation of a run: checkpoints, health, time limits, Weights & Biases."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ted_scale.config import changes
from ted_scale.config.types import Count, PositiveInt, Seconds, Section

FALLING = ("loss", "ppl", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score")
RISING = ("acc", "exact_match", "em", "f1", "mcc", "bleu", "rouge1", "rouge2", "rougeL")


class Checkpoint(Section):
    every: PositiveInt = Field(1000, description="steps between two checkpoints")
    keep: PositiveInt = Field(2, description="number of the last checkpoints that are kept")
    keep_every: Annotated[int, Field(ge=0)] = Field(
        0, description="checkpoints whose step is a multiple of this are kept for ever; 0: none"
    )
    keep_best: bool = Field(False, description="keep the checkpoint with the lowest validation loss of its step")
    best: Annotated[str, Field(pattern=r"^(val/\S+)?$")] = Field(
        "",
        description="a number of metrics.jsonl, for example val/loss or val/suite/boolq/acc; the checkpoint with the best value "
        "is kept, and ted-scale export finds it; docs/checkpoints.md",
    )
    best_is: Literal["lowest", "highest"] | None = Field(
        None,
        description="which value of checkpoint.best is the best; default: known for losses, perplexities and the usual scores",
    )
    background: bool = Field(True, description="false: a step waits until its checkpoint is on disk")
    max_failed: PositiveInt = Field(3, description="saves in a row that may fail; the next one ends the run")
    copy_to: Annotated[str, Field(pattern=r"^(s3://[^/]+.*)?$")] = Field(
        "",
        description="s3://BUCKET/PREFIX for copies of checkpoints; a run that has lost its folder continues from its copies",
    )

    @property
    def judged_by(self) -> str:
        """The number by which checkpoints are compared. "" if they are not compared."""
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
    """Whether the lowest or the highest value is best; None if unknown. The last part of the number's name decides. lm-eval may
    add the name of a filter to it: exact_match_strict-match."""
    metric = number.rpartition("/")[2]
    of = {"lowest": FALLING, "highest": RISING}
    known = [
        best for best, names in of.items() if any(metric == name or metric.startswith(f"{name}_") for name in names)
    ]
    return known[0] if known else None


class Resume(Section):
    """How a run continues from a checkpoint of another run file."""

    allow: list[str] = Field(
        [], description='keys that may differ from the checkpoint although they decide the result; as ["train.betas"]'
    )

    @model_validator(mode="after")
    def names_are_known(self):
        for name in self.allow:
            if (hint := changes.unknown_name(name)) is not None:
                raise ValueError(f"allow must name keys that decide the result, but has '{name}'; {hint}")
        return self


class Health(Section):
    """What a run does if its numbers are bad; docs/health.md."""

    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="what follows if a loss or a gradient is not finite; skip: drop the step's update, count it and continue",
    )
    max_skipped: PositiveInt = Field(10, description="steps in a row that may be dropped; the next one stops the run")
    max_skipped_all: PositiveInt = Field(100, description="steps of the whole run that may be dropped")
    on_spike: Literal["alert", "rewind", "off"] = Field(
        "alert",
        description="what follows after a loss spike; rewind: load the last good checkpoint, and continue with samples that were "
        "not read yet",
    )
    spike_factor: Annotated[float, Field(gt=1)] = Field(
        1.5,
        description="a step is a spike if its loss/total (with teacher.every > 1: its loss/ce) is above this factor times the "
        "median of the steps before",
    )
    spike_window: Annotated[int, Field(ge=4)] = Field(
        128, description="number of steps of this median; the check begins after a quarter of them"
    )
    max_rewinds: PositiveInt = Field(
        3, description="number of rewinds in a row that do not get beyond the spike; the next one stops the run"
    )
    replicas_every: Annotated[int, Field(ge=0)] = Field(
        0,
        description="steps between two comparisons of the bits that must be equal on all ranks; also before each save; 0: never",
    )


class Vitals(Section):
    """The health of the distillation, from samples of tokens; docs/vitals.md."""

    every: Annotated[int, Field(ge=0)] = Field(
        100, description="steps between two measurements of each matched pair and the output, by rank 0; 0: never"
    )


class Limits(Section):
    """Time limits. Work that takes longer ends the run with a reason, because a cluster often runs unwatched."""

    step_s: Seconds = Field(1800.0, description="limit for a step, a batch of validation, or a checkpoint")
    start_s: Seconds = Field(
        3600.0,
        description="limit for start-up, a rewind, or a stage's first step, which compiles; it counts only while no rank reads a "
        "byte; at least step_s",
    )
    silence_s: Annotated[Seconds, Field(ge=3)] = Field(
        20.0,
        description="a rank without a heartbeat for this time counts as dead; DeepSpeed's launcher kills the other ranks after 30 "
        "s",
    )

    @property
    def longest_s(self) -> float:
        return max(self.step_s, self.start_s)


class Samples(Section):
    """Text that student and teacher write during training: runs/NAME/samples.jsonl; docs/reading_a_run.md."""

    every: Count = Field(
        0, description="steps of stage II between two samples; also before its first and after its last step; 0: never"
    )
    prompts: Annotated[list[str], Field(max_length=64)] = Field([], description="texts that both models continue")
    from_validation: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="number of beginnings of held-out texts that are also prompts"
    )
    tokens: PositiveInt = Field(64, description="number of tokens written after each prompt; each is the likeliest one")

    @model_validator(mode="after")
    def something_is_asked(self):
        if self.every and not (self.prompts or self.from_validation):
            raise ValueError("every must be 0 without prompts, but is above; give prompts, or set from_validation")
        return self


class Report(Section):
    """The page runs/NAME/report.html, which a separate process writes; docs/report.md."""

    every_minutes: Annotated[float, Field(ge=0, le=1e5)] = Field(
        0.0, description="minutes between two pages; a last page is written at the end and also sent to W&B; 0: never"
    )


class Wandb(Section):
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")] = Field(
        description="the project in which W&B shows the run"
    )
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="auto: online with an API key, else offline; online: the same, but --dry-run warns if there is no key; "
        "disabled: as without this section",
    )
    entity: str | None = Field(None, description="user or team; default: that of the API key")
    group: str | None = Field(None, description="group in which W&B shows runs together; default: the run's name")
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        [], description="tags by which W&B finds the run"
    )
    notes: str | None = Field(None, description="text that W&B shows beside the run")
