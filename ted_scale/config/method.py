"""The method: matched blocks, filters, losses, optimizer and validation."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ted_scale.config.types import Count, Fraction, NonNegative, Positive, PositiveInt, Section


class Pairs(Section):
    rule: Literal["cut", "uniform", "last", "late_to_early"] = Field(
        "cut",
        description="cut: the blocks that ted-scale cut-student kept of this teacher; without such a record, uniform; last: one "
        "pair, of the last blocks; late_to_early: one pair, the student's block at an eighth of its depth and the teacher's last",
    )
    explicit: list[tuple[int, int]] = Field([], description="(student block, teacher block), from 0; replaces the rule")
    skip_last: Count = Field(0, description="pairs at the end of the list that are left out")

    @field_validator("explicit", mode="before")
    @classmethod
    def lists_are_pairs(cls, value):
        return [tuple(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value


class Filters(Section):
    """The filters, and how stage I trains them."""

    steps: Count = Field(
        0, description="0: no stage I; filters keep their start, and the student's filters train in stage II"
    )
    width: PositiveInt | Literal["auto", "full"] = Field(
        "auto",
        description="common width F of both filtered states; auto: 5 % of the student's parameters; full: the teacher's",
    )
    mlp: Count = Field(0, description="hidden width of a residual MLP before the linear; 0: none")
    head: Literal["shared", "own", "per_layer"] = Field(
        "shared",
        description="what stage I reads filtered states with; shared: the teacher's frozen head for both sides; own: each model's; "
        "per_layer: a new one for every filter, dropped afterwards",
    )
    start: Literal["states", "random", "noise"] = Field(
        "states",
        description="principal directions of the teacher's states; random: the identity where it fits, else random; noise: random "
        "also where the identity fits. For lwd, which has no filters of the teacher, states is as random",
    )
    lr: NonNegative = Field(
        1e-3,
        description="peak learning rate of the filters, in both stages; 0: they keep their start, without a stage I",
    )
    sample_tokens: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="share of a step's tokens that stage I reads, drawn for each pair; auto: all heads cost as much as two bodies",
    )
    sample_pairs: PositiveInt | None = Field(None, description="pairs that stage I reads in a step; default: all")
    from_run: str | None = Field(None, alias="from", description="reuse stage I of this run folder")

    @model_validator(mode="after")
    def stage_one_trains(self):
        if self.steps and not self.lr:
            raise ValueError(
                f"steps must be 0 where filters.lr is 0, but is {self.steps}: such a stage I would train nothing"
            )
        return self


class Schedule(Section):
    """A loss weight over the steps of stage II: from `start` to `end`, and 0 before or after a fraction of the stage or a token."""

    start: NonNegative = Field(description="the weight at the start of stage II")
    end: NonNegative | None = Field(None, description="constant and rate have none")
    shape: Literal["constant", "linear", "cosine", "rate"] = Field(
        "constant", description="rate: start times the learning rate's share of its peak"
    )
    over_tokens: PositiveInt | None = Field(
        None,
        description="linear and cosine are at end once stage II has read so many; default: at the end of the stage",
    )
    on_after: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="0 before this fraction")
    on_after_tokens: PositiveInt | None = Field(None, description="0 until stage II has read so many")
    off_after: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="0 from this fraction on")
    off_after_tokens: PositiveInt | None = Field(None, description="0 once stage II has read so many")

    @model_validator(mode="after")
    def shape_and_end_belong_together(self):
        if self.shape in ("constant", "rate") and self.end not in (None, self.start):
            raise ValueError(f"shape must be linear or cosine when end is set, but is '{self.shape}'")
        if self.shape in ("linear", "cosine") and self.end is None:
            raise ValueError(f"end must be set when shape is '{self.shape}', but is missing")
        if self.shape in ("constant", "rate") and self.over_tokens:
            raise ValueError(
                f"over_tokens must be left out when shape is '{self.shape}', but is {self.over_tokens}; only linear and cosine go "
                "to an end"
            )
        return self

    @model_validator(mode="after")
    def borders_agree(self):
        if self.on_after and self.off_after and self.on_after >= self.off_after:
            raise ValueError(f"on_after must be below off_after ({self.off_after}), but is {self.on_after}")
        for key in ("on_after", "off_after"):
            if (fraction := getattr(self, key)) and getattr(self, f"{key}_tokens"):
                raise ValueError(f"{key} must not be set beside {key}_tokens, but is {fraction}; keep one")
        return self


IN_TOKENS = ("over_tokens", "on_after_tokens", "off_after_tokens")

Weight = Schedule | NonNegative


def on_between(weight: Schedule, tokens: int) -> tuple[float, float]:
    """The fractions of stage II, which reads so many tokens, at which a term begins and ends."""
    begins = weight.on_after or (weight.on_after_tokens or 0) / tokens
    falls_to_0 = weight.over_tokens if weight.end == 0 else None
    last = min(weight.off_after_tokens or math.inf, falls_to_0 or math.inf)
    return begins, min(weight.off_after or math.inf, last / tokens)


def is_on(weight: Schedule | float, fraction: float, tokens: int) -> bool:
    """Whether a term counts after this fraction of stage II, wherever its shape takes it until it ends."""
    if not isinstance(weight, Schedule):
        return weight > 0
    begins, ends = on_between(weight, tokens)
    return begins <= fraction < ends and max(weight.start, weight.end or 0.0) > 0


def changes_of(weights: Iterable[Schedule | float], tokens: int) -> list[float]:
    """The fractions from which on some term may begin or have ended, the start among them."""
    borders = [on_between(weight, tokens) for weight in weights if isinstance(weight, Schedule)]
    return sorted({0.0, *(at for each in borders for at in each if at < 1)})


PRESETS = {
    # The paper's stage II: plain MSE, temperature 2, constant weights.
    "paper": {"temperature": 2.0, "kind": "mse"},
    # Hidden states as an early hint (METHOD: HLD, REPA): the layer loss ends after a tenth of stage II.
    "hint": {"layer": {"start": 1.0, "off_after": 0.1}},
    # The teacher's states alone first, without a product with the vocabulary; then the text without a teacher (docs/results.md).
    "states_first": {"ce": {"start": 1.0, "on_after": 0.5}, "kl": 0.0, "layer": {"start": 1.0, "off_after": 0.5}},
    # Most of the teacher while the learning rate is high, least at its end (Peng et al., arXiv 2410.16215: WSD for both).
    "wsd": {"kl": {"start": 1.0, "shape": "rate"}},
    # A small teacher for a larger student, early on (arXiv 2602.05393), with method = "lwd"; pairs.rule is late_to_early (run.py).
    "let": {"kl": 0.0, "layer": {"start": 0.1, "end": 0.0, "shape": "linear"}, "kind": "cosine"},
}


class Loss(Section):
    preset: Literal["paper", "hint", "states_first", "wsd", "let"] | None = Field(
        None, description="fills what this section leaves out, and let pairs.rule; docs/comparing.md"
    )
    ce: Weight = Field(1.0, description="weight of the next-token loss: a number, or a table over time")
    kl: Weight = Field(1.0, description="weight of the logits' loss, which carries temperature squared")
    layer: Weight = Field(1.0, description="weight of the layer loss, the mean over pairs")
    balance: Literal["fixed", "auto"] = Field(
        "fixed",
        description="auto: layer times mean KL over mean layer loss, of the steps before; equal weights then make both terms "
        "equally large",
    )
    temperature: Positive = Field(1.0, description="divides the logits of both sides in the logits' loss")
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward", description="the logits' loss: KL(teacher, student), KL(student, teacher), or Jensen-Shannon's"
    )
    top_k: Count = Field(
        0, description="the teacher's likeliest tokens, beside one bucket for all others; 0: every token"
    )
    skip_low_entropy: Fraction = Field(
        0.0, description="the share of tokens, those where the teacher is surest, that have no such loss; 0: none"
    )
    kind: Literal["nmse", "mse", "cosine"] = Field(
        "nmse", description="the layer loss of a token; nmse: squared distance over the teacher's squared norm"
    )
    tokens: Literal["targets", "all"] = Field(
        "targets",
        description="which tokens kl and layer count where a corpus has targets; all: prompts, too, for a teacher can teach them",
    )
    backend: Literal["auto", "triton", "torch", "compiled"] = Field("auto", description="ted_scale/kernels/README.md")
    mode: Literal["chunked", "strict"] = Field(
        "chunked", description="strict: keeps few logits in memory, for 1.6 times the work of the logit losses"
    )
    chunk_tokens: PositiveInt | None = Field(None, description="tokens a chunk; default: what the scratch budget holds")

    @model_validator(mode="before")
    @classmethod
    def preset_fills_what_is_not_written(cls, values):
        return {**PRESETS.get(str(values.get("preset")), {}), **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def mode_and_backend_know_the_terms(self):
        if self.mode == "strict":
            for key, usual in (("divergence", "forward"), ("top_k", 0), ("skip_low_entropy", 0.0)):
                if (value := getattr(self, key)) != usual:
                    raise ValueError(
                        f"{key} must be {usual!r} where loss.mode is 'strict', but is {value!r}; use 'chunked'"
                    )
        if self.backend == "triton" and self.top_k:
            raise ValueError(
                f"top_k must be 0 where loss.backend is 'triton', but is {self.top_k}; Triton has no kernel for it: use 'auto'"
            )
        return self


class Train(Section):
    steps: PositiveInt = Field(
        0,  # where epochs are given, until data/epochs.py has counted
        description="optimizer steps of ce, kd, lwd, and of TED's stage II; or epochs",
    )
    epochs: Positive | None = Field(
        None,
        description="in place of steps: how often the corpus is read, its rows rounded up to whole steps; docs/fine_tuning.md",
    )
    epochs_of: str | None = Field(None, description="the corpus, by its name, that epochs are of; needed with several")
    tokens_per_step: PositiveInt = Field(description="over all ranks; gradient accumulation is derived")
    micro_batch: PositiveInt = Field(description="rows of data.seq_len tokens that a rank computes at once")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of weights and activations in a step; masters, moments and sums are fp32"
    )
    lr: Positive = Field(description="peak learning rate of the student")
    min_lr: NonNegative = Field(0.0, description="learning rate at the end of the schedule")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then a linear decay"
    )
    warmup_steps: Count = Field(0, description="steps over which the rate rises to lr")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="wsd: the last part, which decays")
    clip: NonNegative = Field(1.0, description="largest gradient norm; 0: no clipping")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="of AdamW")
    eps: Positive = Field(1e-8, description="of AdamW")
    weight_decay: NonNegative = Field(0.1, description="of the student's matrices; norms, biases and filters have none")
    reduce_once: bool = Field(
        False,
        description="each rank sums its gradients whole, and they are reduced once a step instead of once a micro-batch",
    )

    @property
    def tokens(self) -> int:
        """Of the stage; 0 while only its epochs are known."""
        return self.steps * self.tokens_per_step

    @model_validator(mode="after")
    def steps_or_epochs(self):
        if not (self.steps or self.epochs):
            raise ValueError("steps must be set, but is missing; or set train.epochs")
        if self.steps and self.epochs:
            raise ValueError(
                f"steps must be left out where epochs are given ({self.epochs:g}), but is {self.steps}; keep one"
            )
        if self.epochs_of and not self.epochs:
            raise ValueError(f"epochs_of must be left out without epochs, but is '{self.epochs_of}'; set epochs, too")
        return self

    @field_validator("betas", mode="before")
    @classmethod
    def list_is_pair(cls, value):
        return tuple(value) if isinstance(value, list) else value


class Validation(Section):
    every: Count = Field(0, description="steps; 0: only at the start and the end of a stage")
    tokens: PositiveInt = Field(65536, description="over all corpora that hold some out, as many of each")
    suite: list[str] = Field(
        [],
        description="tasks of lm-eval, by a suite's name or their own, asked of the student as it stands",
    )
    suite_every: PositiveInt = Field(1, description="validations; the first and the last always count")
    suite_files: str | None = Field(None, description="a folder of task files and their data, instead of the hub")
    suite_limit: PositiveInt | None = Field(None, description="questions of each task; default: all")
    suite_batch: PositiveInt = Field(8, description="texts in a forward of a rank")

    @field_validator("suite", mode="before")
    @classmethod
    def one_name_is_a_list(cls, value):
        return [value] if isinstance(value, str) else value
