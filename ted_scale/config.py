"""The run file's sections: every key, its type, its default. One TOML a run; run_file.py reads and writes it.

This is the one home of every number of a run. ds_configs/*.json say how ZeRO shards, offloads and communicates, and
nothing else. What follows from a run (pairs, accumulation, parameter counts) is worked out in plan.py.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ted_scale import redact, resume
from ted_scale.parsing import COUNT_LIMIT

Count = Annotated[int, Field(ge=0, lt=COUNT_LIMIT)]
PositiveInt = Annotated[int, Field(gt=0, lt=COUNT_LIMIT)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]
Method = Literal["ce", "kd", "lwd", "ted"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    path: str = Field(description="local folder or hub id of a causal LM with safetensors weights")
    init: Literal["weights", "random"] = Field(
        "weights", description="random: the folder has a config.json alone; of a teacher only for measurements"
    )


class Student(Model):
    gradient_checkpointing: bool = False


class Corpus(Section):
    """A domain of the blend."""

    path: str = Field(description="a .bin/.idx prefix, or a folder of them; on disk, or under s3:// or msc://")
    name: str = Field("", description="what logs and metrics call it; default: the path's last part")
    weight: NonNegative = 1.0
    repeat: bool = Field(True, description="false: refuse a run that reads it more than once")
    validation: Fraction = Field(0.0, description="share of the corpus's tokens, at its end, held out")

    @model_validator(mode="before")
    @classmethod
    def the_path_names_it(cls, values):
        if isinstance(values, dict) and not values.get("name") and isinstance(values.get("path"), str):
            return {**values, "name": Path(values["path"]).name}
        return values


class Blend(Section):
    """Which share of the samples a corpus gives."""

    kind: Literal["static", "temperature", "adaptive"] = Field(
        "static", description="static: by data.corpora.weight; adaptive: DDK, weight is where it starts from"
    )
    temperature: Positive = Field(
        1.0, description="share by (weight * tokens)^(1/temperature): 1 by size, more is flatter"
    )
    every: PositiveInt = Field(1000, description="adaptive: steps from one measurement to the next")
    smoothing: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="adaptive: share that follows the measurement; the rest is alike for all corpora"
    )


class Streaming(Section):
    """How corpora under s3:// and msc:// are read; those on disk need none of it."""

    folder: str = Field("", description="indices and chunks, on a disk of the node; default: in the temporary folder")
    cache_gib: NonNegative = Field(
        4.0, description="bound of the chunks on disk, for all processes of the node; 0: none"
    )
    chunk_kib: Annotated[int, Field(ge=4, multiple_of=4)] = Field(
        256, description="read at once; docs/data.md has the cost"
    )
    ahead: PositiveInt = Field(64, description="windows that are being fetched before they are needed, a process")
    requests: PositiveInt = Field(16, description="at the same time, a process")
    patience_s: Positive = Field(300.0, description="how long a request that fails is tried again before the run ends")

    @property
    def place(self) -> Path:
        return Path(self.folder or f"{tempfile.gettempdir()}/ted_scale-{os.getuid()}")


class Data(Section):
    corpora: list[Corpus] = Field(min_length=1)
    blend: Blend = Blend()
    stream: Streaming = Streaming()
    seq_len: PositiveInt
    attention: Literal["causal", "document"] = Field(
        "causal", description="document: none across a document's border, and positions restart there"
    )
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="processes a rank that read; 0: a thread of the rank"
    )
    prefetch: PositiveInt = Field(2, description="steps that are read ahead")

    @model_validator(mode="after")
    def names_differ(self):
        names = [corpus.name for corpus in self.corpora]
        if not all(names):
            raise ValueError("data.corpora.name must be set where the path ends in none, but is ''; set name")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"data.corpora.name must be another for every corpus, but '{twice}' is there twice; set name"
            )
        return self


class Pairs(Section):
    rule: Literal["cut", "uniform"] = Field(
        "cut", description="cut: as tools/cut_student.py cut the student from this teacher; uniform where it did not"
    )
    explicit: list[tuple[int, int]] = Field([], description="(student block, teacher block), from 0; replaces the rule")
    skip_last: Count = 0

    @field_validator("explicit", mode="before")
    @classmethod
    def lists_are_pairs(cls, value):
        return [tuple(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value


class Filters(Section):
    """Stage I: what is learned, and how."""

    steps: Count = Field(0, description="0: no stage I; filters are as they start, and the student's train in stage II")
    width: PositiveInt | Literal["auto", "full"] = Field(
        "auto",
        description="common width D of both filtered states; auto: 5 % of the student's parameters; full: the teacher's",
    )
    mlp: Count = Field(0, description="hidden width of a residual MLP before the linear; 0: none")
    head: Literal["shared", "own", "per_layer"] = "shared"
    start: Literal["states", "random"] = Field(
        "states",
        description="principal directions of the teacher's states; random: the identity where it fits, else random",
    )
    lr: Positive = 1e-3
    sample_tokens: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="share of the tokens that stage I reads a step, drawn for each pair; auto: heads cost two bodies",
    )
    sample_pairs: PositiveInt | None = Field(None, description="pairs that stage I reads a step; default: all")
    from_run: str | None = Field(None, alias="from", description="reuse stage I of this run folder")


class Schedule(Section):
    """A loss weight over stage II, `at` a fraction of it."""

    start: NonNegative
    end: NonNegative | None = Field(None, description="constant has none")
    shape: Literal["constant", "linear", "cosine"] = "constant"
    off_after: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="0 from this fraction on")

    @model_validator(mode="after")
    def shape_and_end_belong_together(self):
        if self.shape == "constant" and self.end not in (None, self.start):
            raise ValueError("shape must be linear or cosine when end is set, but is 'constant'")
        if self.shape != "constant" and self.end is None:
            raise ValueError(f"end must be set when shape is '{self.shape}', but is missing")
        return self


Weight = Schedule | NonNegative

PRESETS = {
    # The paper's stage II: plain MSE, temperature 2, constant weights.
    "paper": {"temperature": 2.0, "kind": "mse"},
    # Hidden states as an early hint (METHOD: HLD, REPA): the layer loss ends after a tenth of stage II.
    "hint": {"layer": {"start": 1.0, "off_after": 0.1}},
}


class Loss(Section):
    preset: Literal["paper", "hint"] | None = None
    ce: Weight = 1.0
    kl: Weight = 1.0
    layer: Weight = 1.0
    temperature: Positive = 1.0
    kind: Literal["nmse", "mse", "cosine"] = "nmse"
    backend: Literal["auto", "triton", "torch", "compiled"] = Field("auto", description="ted_scale/kernels/README.md")
    mode: Literal["chunked", "strict"] = Field(
        "chunked", description="strict: no logits in memory, 1.6 times the work of the logit losses"
    )
    chunk_tokens: PositiveInt | None = Field(None, description="tokens a chunk; default: what the scratch budget holds")

    @model_validator(mode="before")
    @classmethod
    def preset_fills_what_is_not_written(cls, values):
        return {**PRESETS.get(str(values.get("preset")), {}), **values} if isinstance(values, dict) else values


class Train(Section):
    steps: PositiveInt = Field(description="optimizer steps of ce, kd, lwd, and of TED's stage II")
    tokens_per_step: PositiveInt = Field(description="over all ranks; gradient accumulation is derived")
    micro_batch: PositiveInt
    precision: Literal["bf16", "fp32"] = "bf16"
    lr: Positive
    min_lr: NonNegative = Field(0.0, description="learning rate at the end of the schedule")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = 0
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="wsd: the last part, which decays")
    clip: NonNegative = Field(1.0, description="largest gradient norm; 0: no clipping")
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1

    @field_validator("betas", mode="before")
    @classmethod
    def list_is_pair(cls, value):
        return tuple(value) if isinstance(value, list) else value


class Validation(Section):
    every: Count = Field(0, description="steps; 0: only at the start and the end of a stage")
    tokens: PositiveInt = Field(65536, description="over all corpora that hold some out, as many of each")


class Checkpoint(Section):
    every: PositiveInt = Field(1000, description="steps")
    keep: PositiveInt = Field(2, description="the last ones")
    keep_every: Annotated[int, Field(ge=0)] = Field(
        0, description="those of every so many steps stay for ever; 0: none"
    )
    keep_best: bool = Field(False, description="the one with the lowest validation loss of its step stays")
    background: bool = Field(True, description="false: a step waits until its checkpoint is on disk")
    max_failed: PositiveInt = Field(3, description="saves in a row that may fail; the next one ends the run")
    copy_to: Annotated[str, Field(pattern=r"^(s3://[^/]+.*)?$")] = Field(
        "",
        description="s3://BUCKET/PREFIX that has every checkpoint, too, and that a run without its folder goes on from",
    )


class Resume(Section):
    """What a run goes on with from a checkpoint that was written with another run file."""

    allow: list[str] = Field([], description="keys that may differ although they decide the result, see resume.py")

    @model_validator(mode="after")
    def names_are_known(self):
        for name in self.allow:
            if (hint := resume.unknown_name(name)) is not None:
                raise ValueError(f"allow must name keys that decide the result, but has '{name}'; {hint}")
        return self


class Health(Section):
    """What a run does where its numbers go wrong; docs/health.md."""

    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite; skip: drop the step's update, count it and go on"
    )
    max_skipped: PositiveInt = Field(10, description="steps in a row that may be dropped; the next one stops the run")
    max_skipped_all: PositiveInt = Field(100, description="steps of the whole run that may be dropped")
    on_spike: Literal["alert", "rewind", "off"] = Field(
        "alert", description="rewind: back to the last good checkpoint, and on with samples not yet read"
    )
    spike_factor: Annotated[float, Field(gt=1)] = Field(
        1.5, description="a spike is a loss/total above this many medians of the steps before it"
    )
    spike_window: Annotated[int, Field(ge=4)] = Field(
        128, description="steps of that median; a spike is looked for once a quarter of them is there"
    )
    max_rewinds: PositiveInt = Field(3, description="without a step past the spike; the next one stops the run")
    replicas_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps after which ranks compare the bits that must be alike, as before each save; 0: never"
    )


class Limits(Section):
    """What takes longer ends the run with a reason, for nobody watches a cluster at night."""

    step_s: Seconds = Field(1800.0, description="a step, a batch of validation, a checkpoint")
    start_s: Seconds = Field(3600.0, description="start-up and a stage's first step, which compiles; at least step_s")
    silence_s: Annotated[Seconds, Field(ge=3)] = Field(
        20.0,
        description="no sign of a rank: it is taken for dead, before DeepSpeed's launcher kills the others after 30 s",
    )

    @property
    def longest_s(self) -> float:
        return max(self.step_s, self.start_s)


class Wandb(Section):
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    mode: Literal["auto", "online", "offline"] = Field("auto", description="auto: online with an API key, else offline")
    entity: str | None = None
    group: str | None = None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []
    notes: str | None = None


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    method: Method
    seed: Count = 0
    runs: str = Field("runs", description="the folder in which the run's folder NAME is made; shared by all nodes")
    ds_config: str = "ds_configs/zero3.json"
    fused_blocks: Literal["auto", "liger", "off"] = Field(
        "auto", description="RMSNorm, rotary positions, gated MLP by Liger; auto: on a GPU, where it is installed"
    )
    student: Student
    teacher: Model | None = None
    data: Data
    pairs: Pairs = Pairs()
    filters: Filters = Filters()
    loss: Loss = Loss()
    train: Train
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    resume: Resume = Resume()
    health: Health = Health()
    limits: Limits = Limits()
    log_every: PositiveInt = 10
    wandb: Wandb | None = None

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def matches_layers(self) -> bool:
        return self.method in ("lwd", "ted")

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
    def sections_fit_the_method(self):
        if self.method != "ce" and self.teacher is None:
            raise ValueError(f"teacher.path must be set for method = '{self.method}', but there is no [teacher]")
        if self.train.warmup_steps >= self.train.steps:
            limit = self.train.steps
            raise ValueError(
                f"train.warmup_steps must be below train.steps ({limit}), but is {self.train.warmup_steps}"
            )
        if self.train.min_lr > self.train.lr:
            raise ValueError(f"train.min_lr must be at most train.lr ({self.train.lr}), but is {self.train.min_lr}")
        return self
