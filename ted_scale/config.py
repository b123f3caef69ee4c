"""The run file: one TOML a run, read strictly into frozen values, with `--set section.key=value` on top.

This is the one home of every number of a run. ds_configs/*.json say how ZeRO shards, offloads and communicates, and
nothing else. What follows from a run (pairs, accumulation, parameter counts) is worked out in plan.py.
"""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from ted_scale.errors import UserError

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Method = Literal["ce", "kd", "lwd", "ted"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    path: str = Field(description="local folder or hub id of a causal LM with safetensors weights")


class Student(Model):
    init: Literal["weights", "random"] = "weights"
    gradient_checkpointing: bool = False


class Corpus(Section):
    path: str = Field(description="a .bin/.idx prefix, or a folder of them")
    weight: NonNegative = 1.0
    validation: Fraction = Field(0.0, description="share of the corpus's tokens, whole documents at its end, held out")


class Data(Section):
    corpora: list[Corpus] = Field(min_length=1)
    seq_len: PositiveInt
    mask_documents: bool = Field(False, description="no attention and no label across a document boundary")
    prefetch: PositiveInt = 2


class Pairs(Section):
    rule: Literal["uniform"] = "uniform"
    explicit: list[tuple[int, int]] = Field([], description="(student block, teacher block), from 0; replaces the rule")
    skip_last: Annotated[int, Field(ge=0)] = 0

    @field_validator("explicit", mode="before")
    @classmethod
    def lists_are_pairs(cls, value):
        return [tuple(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value


class Filters(Section):
    """Stage I: what is learned, and how."""

    steps: PositiveInt = 1000
    width: PositiveInt | None = Field(
        None, description="common width D of both filtered states; default: the teacher's"
    )
    mlp: Annotated[int, Field(ge=0)] = Field(0, description="hidden width of a residual MLP before the linear; 0: none")
    head: Literal["shared", "own", "per_layer"] = "shared"
    lr: Positive = 1e-3
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
    chunk_tokens: PositiveInt = 1024

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
    warmup_steps: Annotated[int, Field(ge=0)] = 0
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
    every: Annotated[int, Field(ge=0)] = Field(0, description="steps; 0: only at the start and the end of a stage")
    tokens: PositiveInt = 65536


class Checkpoint(Section):
    every: PositiveInt = 1000
    keep: PositiveInt = 2


class Wandb(Section):
    project: str
    mode: Literal["auto", "online", "offline"] = Field("auto", description="auto: online with an API key, else offline")
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []
    notes: str | None = None


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    method: Method
    seed: Annotated[int, Field(ge=0)] = 0
    runs: str = Field("runs", description="the folder in which the run's folder NAME is made; shared by all nodes")
    ds_config: str = "ds_configs/zero3.json"
    student: Student
    teacher: Model | None = None
    data: Data
    pairs: Pairs = Pairs()
    filters: Filters = Filters()
    loss: Loss = Loss()
    train: Train
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    log_every: PositiveInt = 10
    wandb: Wandb | None = None

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def matches_layers(self) -> bool:
        return self.method in ("lwd", "ted")

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


def load_run(path: str | Path, overrides: list[str] = ()) -> Run:
    """Read a run file and put `section.key=value` strings on top; whatever is wrong is one UserError sentence."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config must name a readable run file, but {path} is not: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be valid TOML, but is not: {error}") from None
    for override in overrides:
        put(values, override)
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {sentence(error)}") from None


def put(values: dict, override: str) -> None:
    """Set one `section.key=value`; the value is TOML, and a bare word is a string."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set must look like section.key=value, but is '{override}'")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = dotted.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set must name a key of a section, but {section} in '{override}' is not a section")
    values[key] = value


def sentence(error: ValidationError) -> str:
    """The first fault of a run file, in the project's form."""
    fault = min(error.errors(), key=how_far_from_the_cause)
    names, section = where(fault["loc"])
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    if fault["type"] == "extra_forbidden":
        return unknown_key(f"{dotted}." if dotted else "", fault["loc"][-1], section)
    if fault["type"] == "missing":
        return f"{dotted} must be set, but is missing"
    if fault["type"] == "model_type":
        return f"{dotted} must be a section of keys, but is {fault['input']!r}"
    if fault["type"] == "value_error":  # ours: begins with the key, as seen from the section
        message = fault["msg"].removeprefix("Value error, ")
        return f"{dotted}.{message}" if dotted else message
    wanted = fault["msg"].partition(" should ")[2].partition(" after validation")[0].replace("tuple", "list")
    return f"{dotted} must {wanted}, but is {fault['input']!r}"


def how_far_from_the_cause(fault) -> int:
    """Of a union's faults, the ones of the branch that the user did not write come last."""
    other_branch = fault["type"] in ("model_type", "dict_type") or isinstance(fault["input"], dict)
    return {"extra_forbidden": 0, "missing": 1}.get(fault["type"], 3 if other_branch else 2)


def where(location) -> tuple[list, type]:
    """The known keys and indices on pydantic's way to a fault, which also names the choices of a union; and the last
    section on it."""
    names, section = [], Run
    for part in location:
        field = keys_of(section).get(part)
        if field is not None or isinstance(part, int):
            names.append(part)
        section = (field and section_in(field.annotation)) or section
    return names, section


def unknown_key(parent: str, key: str, section: type) -> str:
    """Close keys of the section itself first, then a section that has this very key."""
    close = [parent + k for k in difflib.get_close_matches(key, sorted(keys_of(section)), n=1)]
    others = {name: section_in(field.annotation) for name, field in keys_of(Run).items()}
    close = close or [f"{name}.{key}" for name, other in others.items() if other and key in keys_of(other)]
    return f"unknown key {parent}{key}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def keys_of(section: type) -> dict:
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_in(annotation) -> type | None:
    found = (p for p in annotation_parts(annotation) if isinstance(p, type) and issubclass(p, BaseModel))
    return next(found, None)


def annotation_parts(annotation) -> list:
    nested = [p for arg in getattr(annotation, "__args__", ()) for p in annotation_parts(arg)]
    return [annotation, *nested]


def to_toml(run: Run) -> str:
    """The resolved run as TOML, readable by `load_run`; what is None stays unwritten, because TOML has no null."""
    values = run.model_dump(by_alias=True, exclude_none=True)
    lines: list[str] = []
    write_table(lines, [], values)
    return "\n".join(lines).lstrip("\n") + "\n"


def write_table(lines: list[str], names: list[str], values: dict) -> None:
    tables = {k: v for k, v in values.items() if isinstance(v, dict) and names == []}
    arrays = {k: v for k, v in values.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    lines += [f"{k} = {toml_value(v)}" for k, v in values.items() if k not in tables and k not in arrays]
    for key, table in tables.items():
        lines += ["", f"[{key}]"]
        write_table(lines, [*names, key], table)
    for key, rows in arrays.items():
        for row in rows:
            lines += ["", f"[[{'.'.join([*names, key])}]]"]
            write_table(lines, [*names, key], row)


def toml_value(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    # TOML's strings, numbers and booleans are written as JSON's; but it has no surrogates, and escapes DEL too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


DS_OWNED_BY_RUN = {
    "train_batch_size": "train.tokens_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "gradient_clipping": "train.clip",
    "optimizer": "train.lr",
    "scheduler": "train.schedule",
    "wandb": "wandb.project",
    "steps_per_print": "log_every",
}


def load_ds_config(path: str) -> dict:
    """The ZeRO, offload and communication part; a file that sets what the run file owns is refused."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"ds_config must name a readable file, but {path} is not: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"ds_config {path} must be valid JSON, but is not: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization"), dict):
        raise UserError(f"ds_config {path} must be a JSON object with a zero_optimization section, but is not")
    for key, home in DS_OWNED_BY_RUN.items():
        if key in values:
            raise UserError(f"ds_config {path} must leave {key} to the run file, but sets it; set {home} there instead")
    if values["zero_optimization"].get("stage") != 3:
        stage = values["zero_optimization"].get("stage")
        raise UserError(f"ds_config {path}: zero_optimization.stage must be 3, but is {stage}")
    return values
