"""The method: matched blocks, filters, losses, optimizer and validation."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ted_scale.config.types import Count, Fraction, NonNegative, Positive, PositiveInt, Section


class Pairs(Section):
    rule: Literal["cut", "uniform", "last", "late_to_early"] = Field(
        "cut",
        description="cut: the blocks of this teacher that ted-scale cut-student kept; without such a record, uniform; last: one "
        "pair, of the last blocks; late_to_early: one pair, the student's block at an eighth of its depth and the "
        "teacher's last",
    )
    explicit: list[tuple[int, int]] = Field([], description="(student block, teacher block), from 0; replaces the rule")
    skip_last: Count = Field(0, description="number of pairs at the end of the list that are left out")

    @field_validator("explicit", mode="before")
    @classmethod
    def lists_are_pairs(cls, value):
        return [tuple(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value


class Filters(Section):
    """The filters, and how stage I trains them."""

    steps: Count = Field(
        0, description="0: no stage I; the teacher's filters keep their start, and stage II trains the student's"
    )
    width: PositiveInt | Literal["auto", "full"] = Field(
        "auto",
        description="common width F of both filtered states; auto: 5 % of the student's parameters; full: the teacher's",
    )
    mlp: Count = Field(0, description="hidden width of a residual MLP before the linear; 0: none")
    head: Literal["shared", "own", "per_layer"] = Field(
        "shared",
        description="the head through which stage I reads filtered states; shared: the teacher's frozen head for both sides; own: "
        "each model's own head; per_layer: a new head for every filter, dropped after stage I",
    )
    start: Literal["states", "random", "noise"] = Field(
        "states",
        description="states: principal directions of the teacher's states; random: the identity if it fits, else random; noise: "
        "always random. For lwd, which has no filters of the teacher, states means random",
    )
    lr: NonNegative = Field(
        1e-3,
        description="peak learning rate of the filters, in both stages; 0: they keep their start, and there is no stage I",
    )
    sample_tokens: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="share of a step's tokens that stage I reads, drawn for each pair; auto: all heads together cost as much as "
        "the forward of both bodies",
    )
    sample_pairs: PositiveInt | None = Field(None, description="pairs that stage I reads in a step; default: all")
    from_run: str | None = Field(None, alias="from", description="use the filters of stage I of this run folder")

    @model_validator(mode="after")
    def stage_one_trains(self):
        if self.steps and not self.lr:
            raise ValueError(
                f"steps must be 0 where filters.lr is 0, but is {self.steps}: such a stage I would train nothing"
            )
        return self


class Schedule(Section):
    """A loss weight over the steps of stage II. It goes from `start` to `end`. It may be 0 before or after some fraction or
    number of tokens of the stage."""

    start: NonNegative = Field(description="the weight at the start of stage II")
    end: NonNegative | None = Field(None, description="the weight at the end, for linear and cosine only")
    shape: Literal["constant", "linear", "cosine", "rate"] = Field(
        "constant", description="rate: start times the learning rate as a share of its peak"
    )
    over_tokens: PositiveInt | None = Field(
        None,
        description="linear and cosine reach end when stage II has read this many tokens; default: at the end of the stage",
    )
    on_after: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="0 before this fraction of stage II")
    on_after_tokens: PositiveInt | None = Field(None, description="0 until stage II has read this many tokens")
    off_after: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="0 from this fraction of stage II on"
    )
    off_after_tokens: PositiveInt | None = Field(None, description="0 after stage II has read this many tokens")

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
    """The fractions of stage II at which a term begins and ends. Stage II reads `tokens` tokens."""
    begins = weight.on_after or (weight.on_after_tokens or 0) / tokens
    falls_to_0 = weight.over_tokens if weight.end == 0 else None
    last = min(weight.off_after_tokens or math.inf, falls_to_0 or math.inf)
    return begins, min(weight.off_after or math.inf, last / tokens)


def is_on(weight: Schedule | float, fraction: float, tokens: int) -> bool:
    """Whether a term is on after this fraction of stage II, whatever weight its shape gives it there."""
    if not isinstance(weight, Schedule):
        return weight > 0
    begins, ends = on_between(weight, tokens)
    return begins <= fraction < ends and max(weight.start, weight.end or 0.0) > 0


def changes_of(weights: Iterable[Schedule | float], tokens: int) -> list[float]:
    """The fractions, with 0 among them, at which some term begins or ends."""
    borders = [on_between(weight, tokens) for weight in weights if isinstance(weight, Schedule)]
    return sorted({0.0, *(at for each in borders for at in each if at < 1)})


PRESETS = {
    # The paper's stage II: plain MSE, temperature 2, constant weights.
    "paper": {"temperature": 2.0, "kind": "mse"},
    # Hidden states as an early hint (HLD, REPA): the layer loss ends after a tenth of stage II.
    "hint": {"layer": {"start": 1.0, "off_after": 0.1}},
    # First the teacher's states alone, without a product with the vocabulary. Then the text without a teacher (docs/results.md).
    "states_first": {"ce": {"start": 1.0, "on_after": 0.5}, "kl": 0.0, "layer": {"start": 1.0, "off_after": 0.5}},
    # KL has most weight while the learning rate is high and least at its end (Peng et al., arXiv 2410.16215: WSD for both).
    "wsd": {"kl": {"start": 1.0, "shape": "rate"}},
    # A small teacher for a larger student, early in training (arXiv 2602.05393), with method = "lwd" and pairs.rule =
    # "late_to_early" (run.py).
    "let": {"kl": 0.0, "layer": {"start": 0.1, "end": 0.0, "shape": "linear"}, "kind": "cosine"},
}


class Loss(Section):
    preset: Literal["paper", "hint", "states_first", "wsd", "let"] | None = Field(
        None, description="values for the keys that this section leaves out; let also sets pairs.rule"
    )
    ce: Weight = Field(1.0, description="weight of the next-token loss: a number, or a table over time")
    kl: Weight = Field(1.0, description="weight of the logits' loss, which is multiplied by temperature squared")
    layer: Weight = Field(1.0, description="weight of the layer loss, the mean over pairs")
    balance: Literal["fixed", "auto"] = Field(
        "fixed",
        description="auto: multiplies layer by the mean KL divided by the mean layer loss, over the steps before; with equal "
        "weights both terms are then equally large",
    )
    temperature: Positive = Field(1.0, description="divides the logits of both sides in the logits' loss")
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward",
        description="the logits' loss: KL(teacher, student), KL(student, teacher), or the Jensen-Shannon divergence",
    )
    top_k: Count = Field(0, description="the teacher's likeliest tokens; all others are one bucket; 0: every token")
    skip_low_entropy: Fraction = Field(
        0.0, description="share of tokens without the logits' loss: those of lowest teacher entropy"
    )
    kind: Literal["nmse", "mse", "cosine"] = Field(
        "nmse", description="the layer loss of a token; nmse: squared distance divided by the teacher's squared norm"
    )
    tokens: Literal["targets", "all"] = Field(
        "targets",
        description="which tokens kl and layer count if a corpus has targets; targets: only targets; all: prompts, too, because "
        "the teacher can teach them",
    )
    backend: Literal["auto", "triton", "torch", "compiled"] = Field(
        "auto", description="the code that computes the losses; ted_scale/kernels/README.md"
    )
    mode: Literal["chunked", "strict"] = Field(
        "chunked", description="strict: keeps fewer logits in memory, for 1.6 times the work of the logit losses"
    )
    chunk_tokens: PositiveInt | None = Field(
        None, description="tokens in a chunk; default: what the budget of memory holds"
    )

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
        0,  # with epochs, until data/epochs.py has counted
        description="optimizer steps of ce, kd, lwd, or of TED's stage II; epochs may replace it",
    )
    epochs: Positive | None = Field(
        None,
        description="how often the corpus is read, in place of steps; its rows are rounded up to whole steps; docs/fine_tuning.md",
    )
    epochs_of: str | None = Field(None, description="the corpus whose epochs count, by name; needed with several")
    tokens_per_step: PositiveInt = Field(description="tokens over all ranks; gradient accumulation follows from it")
    micro_batch: PositiveInt = Field(description="rows of data.seq_len tokens that a rank computes at once")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="precision of weights and activations in a step; masters, moments and sums are fp32"
    )
    lr: Positive = Field(description="peak learning rate of the student")
    min_lr: NonNegative = Field(0.0, description="learning rate at the end of the schedule")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="the learning rate after the warm-up; wsd: constant, then a linear decay"
    )
    warmup_steps: Count = Field(0, description="steps over which the rate rises to lr")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="wsd: fraction of the steps in the decay"
    )
    clip: NonNegative = Field(1.0, description="largest gradient norm; 0: no clipping")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="betas of AdamW")
    eps: Positive = Field(1e-8, description="epsilon of AdamW")
    weight_decay: NonNegative = Field(0.1, description="of the student's matrices; norms, biases and filters have none")
    reduce_once: bool = Field(
        False,
        description="each rank sums whole gradients, and the ranks reduce them once for each step, not once for each micro-batch",
    )

    @property
    def tokens(self) -> int:
        """The tokens of the stage. 0 while only its epochs are known."""
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
    every: Count = Field(0, description="steps between two validations; 0: only at the start and the end of a stage")
    tokens: PositiveInt = Field(65536, description="over all corpora with held-out text, the same number of each")
    suite: list[str] = Field(
        [],
        description="tasks of lm-eval, by a suite's name or their own names; the student answers them with its current weights",
    )
    suite_every: PositiveInt = Field(
        1, description="validations from one suite to the next; the first and last have one"
    )
    suite_files: str | None = Field(None, description="a folder of task files and their data, used instead of the hub")
    suite_limit: PositiveInt | None = Field(None, description="number of questions of each task; default: all")
    suite_batch: PositiveInt = Field(8, description="texts that a rank computes in one forward")

    @field_validator("suite", mode="before")
    @classmethod
    def one_name_is_a_list(cls, value):
        return [value] if isinstance(value, str) else value
