"""A run: its sections, and the rules across sections."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ted_scale.base import redact
from ted_scale.config.data import Data
from ted_scale.config.method import (
    Filters,
    Loss,
    Pairs,
    Schedule,
    Train,
    Validation,
    Weight,
    changes_of,
    is_on,
    on_between,
)
from ted_scale.config.models import Student, Teacher
from ted_scale.config.operation import Checkpoint, Health, Limits, Report, Resume, Samples, Vitals, Wandb
from ted_scale.config.types import Count, PositiveInt, Section

Method = Literal["ce", "kd", "lwd", "ted"]


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="the name of the run and of its folder"
    )
    method: Method = Field(
        description="ce: next-token loss only; kd: also the teacher's logits; lwd: also raw states; ted: also filtered states"
    )
    seed: Count = Field(0, description="seed of the data's order and of everything that starts at random")
    runs: str = Field("runs", description="the folder in which the run's folder NAME is made; all nodes must share it")
    ds_config: str = Field("ds_configs/zero3.json", description="how ZeRO-3 keeps and sends weights; docs/zero.md")
    fused_blocks: Literal["auto", "compile", "liger", "off"] = Field(
        "auto",
        description="compile: torch compiles the blocks; liger: Liger computes RMSNorm, rotary positions and gated MLPs; auto: on "
        "a GPU, compile if attention is torch's own, else liger; on a CPU, off",
    )
    student: Student
    teacher: Teacher | None = None
    data: Data
    pairs: Pairs = Pairs()
    filters: Filters = Filters()
    loss: Loss = Loss()
    train: Train
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    resume: Resume = Resume()
    health: Health = Health()
    vitals: Vitals = Vitals()
    limits: Limits = Limits()
    log_every: PositiveInt = Field(
        10, description="steps between two lines of the log and between two rows of metrics.jsonl"
    )
    samples: Samples = Samples()
    report: Report = Report()
    wandb: Wandb | None = None

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def matches_layers(self) -> bool:
        return self.method in ("lwd", "ted")

    @property
    def asks_every(self) -> int:
        return self.teacher.every if self.teacher and self.method != "ce" else 1

    @property
    def teacher_bits(self) -> str | None:
        """fp8 or int8 if the method uses a teacher and this teacher has 8 bits. Else None."""
        return self.teacher.eight_bits if self.teacher and self.method != "ce" else None

    @property
    def terms(self) -> dict[str, Weight]:
        """The loss weights that the method uses."""
        names = ["ce", *([] if self.method == "ce" else ["kl"]), *(["layer"] if self.matches_layers else [])]
        return {name: getattr(self.loss, name) for name in names}

    @property
    def balances(self) -> bool:
        return self.loss.balance == "auto" and self.matches_layers

    @property
    def held_out_numbers(self) -> list[str]:
        """The keys of the student's numbers on held-out text in metrics.jsonl."""
        names = [corpus.name for corpus in self.data.corpora if corpus.validation]
        each = ["", *(f"{name}/" for name in names if len(names) > 1)] if names else []
        return [f"val/{name}{kind}" for name in each for kind in ("loss", "ppl")]

    @property
    def adapts(self) -> bool:
        return self.data.blend.kind == "adaptive"

    @model_validator(mode="before")
    @classmethod
    def holds_no_secret(cls, values):
        if (name := redact.where_secret(values)) is not None:
            raise ValueError(
                f"{redact.redact(name)} must hold no credentials, but does; they belong into the environment (AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, HF_TOKEN, WANDB_API_KEY)"
            )
        return values

    @model_validator(mode="before")
    @classmethod
    def let_matches_a_late_block_with_an_early_one(cls, values):
        """The preset `let` also changes a default in another section; the rest of the preset is in method.py."""
        loss, pairs = (values.get("loss"), values.get("pairs", {})) if isinstance(values, dict) else (None, None)
        if isinstance(loss, dict) and loss.get("preset") == "let" and isinstance(pairs, dict):
            return {**values, "pairs": {"rule": "late_to_early", **pairs}}
        return values

    @model_validator(mode="after")
    def adaptive_blend_can_measure(self):
        if not self.adapts:
            return self
        if self.method == "ce":
            raise ValueError(
                "data.blend.kind must be static or temperature for method = 'ce', but is 'adaptive', which asks a teacher"
            )
        for i, corpus in enumerate(self.data.corpora):
            if corpus.weight and not corpus.validation:
                raise ValueError(
                    f"data.corpora[{i}].validation must be above 0 for data.blend.kind = 'adaptive', but is 0; hold some of "
                    f"{corpus.name} out"
                )
        return self

    @model_validator(mode="after")
    def epochs_are_of_one_corpus(self):
        train, names = self.train, [corpus.name for corpus in self.data.corpora if corpus.weight]
        if train.epochs and self.adapts:
            raise ValueError(
                f"train.epochs must be left out where data.blend.kind is 'adaptive', but is {train.epochs:g}: what is read of a "
                "corpus follows from measurements; set train.steps"
            )
        if train.epochs_of and train.epochs_of not in names:
            raise ValueError(
                f"train.epochs_of must be a corpus with a weight above 0 ({', '.join(names)}), but is '{train.epochs_of}'"
            )
        if train.epochs and not train.epochs_of and len(names) > 1:
            raise ValueError(
                f"train.epochs_of must be set where several corpora are read, but is missing; name that of {', '.join(names)} "
                "whose epochs count, or set train.steps"
            )
        return self

    @model_validator(mode="after")
    def the_best_is_saved(self):
        best, validation = self.checkpoint.best, self.validation
        if not best:
            return self
        of_suite = best.startswith("val/suite/")
        if best not in self.held_out_numbers and not (of_suite and validation.suite):
            losses = ", ".join(self.held_out_numbers[:6]) or "no corpus holds text out"
            raise ValueError(
                f"checkpoint.best must be what a validation measures ({losses}; val/suite/TASK/METRIC with validation.suite), "
                f"but is '{best}'"
            )
        measured = validation.every * (validation.suite_every if of_suite else 1)
        if not measured:
            raise ValueError(
                f"validation.every must be above 0 where checkpoint.best is '{best}', but is 0: only the end would be measured"
            )
        if measured % self.checkpoint.every:
            raise ValueError(
                f"checkpoint.every must divide the steps between two values of checkpoint.best ({measured}), but is "
                f"{self.checkpoint.every}: what is measured at a step that is not saved cannot be kept"
            )
        return self

    @model_validator(mode="after")
    def samples_have_text(self):
        samples, most = self.samples, self.data.seq_len - 1
        if samples.every and samples.tokens > most:
            raise ValueError(f"samples.tokens must be below data.seq_len ({most + 1}), but is {samples.tokens}")
        if samples.every and samples.from_validation and not any(c.validation for c in self.data.corpora):
            raise ValueError(
                f"samples.from_validation must be 0 where no corpus holds text out, but is {samples.from_validation}; set "
                "data.corpora[0].validation"
            )
        return self

    @model_validator(mode="after")
    def schedules_fit_stage_two(self):
        tokens = self.train.tokens
        if not tokens:
            return self  # data/epochs.py checks again when it has counted the steps
        for name, weight in self.terms.items():
            if not isinstance(weight, Schedule):
                continue
            if (weight.over_tokens or 0) > tokens:
                raise ValueError(
                    f"loss.{name}.over_tokens must be at most the tokens of stage II ({tokens}), but is {weight.over_tokens}, so "
                    "the weight would never be at its end; lower it, or leave it out and the end is that of the stage"
                )
            begins, ends = on_between(weight, tokens)
            if begins >= min(ends, 1.0):
                raise ValueError(
                    f"loss.{name} must begin within stage II ({tokens} tokens) and before it ends, but begins after {begins:.4g} "
                    f"of it and ends after {min(ends, 1.0):.4g}; change its schedule"
                )
        return self

    @model_validator(mode="after")
    def sections_fit_the_method(self):
        if self.method != "ce" and self.teacher is None:
            raise ValueError(f"teacher.path must be set for method = '{self.method}', but there is no [teacher]")
        if self.train.precision == "fp32" and self.method != "ce" and self.teacher.precision:
            raise ValueError(
                f"teacher.precision must be left out where train.precision is 'fp32', but is '{self.teacher.precision}': the "
                "states of both models have one type"
            )
        terms, tokens = self.terms.values(), self.train.tokens
        for fraction in changes_of(terms, tokens) if tokens else ():
            if not any(is_on(weight, fraction, tokens) for weight in terms):
                raise ValueError(
                    f"a term of method = '{self.method}' must be on in every step, but from {fraction:.0%} of stage II on loss.ce, "
                    "loss.kl and loss.layer leave none; change one of them"
                )
            if self.asks_every > 1 and not is_on(self.loss.ce, fraction, tokens):
                raise ValueError(
                    f"teacher.every must be 1 where loss.ce is 0, but is {self.asks_every}: micro-batches without the teacher "
                    "would teach nothing"
                )
        if self.balances and self.loss.kl == 0:
            raise ValueError(
                "loss.balance must be 'fixed' where loss.kl is 0, but is 'auto': there is no KL to balance the layer loss with"
            )
        if 0 < self.train.steps <= self.train.warmup_steps:
            limit = self.train.steps
            raise ValueError(
                f"train.warmup_steps must be below train.steps ({limit}), but is {self.train.warmup_steps}"
            )
        if self.train.min_lr > self.train.lr:
            raise ValueError(f"train.min_lr must be at most train.lr ({self.train.lr}), but is {self.train.min_lr}")
        return self
