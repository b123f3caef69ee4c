"""What a checkpoint's progress.json may hold, to the last number: it decides which data are read and what W&B is told.

checkpoint_files.Progress is the same as a dataclass, for the program; this file is for what comes from a disk. Keys that
are not named here pass, for folder.py knows its own.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import COUNT_LIMIT, parse_json
from ted_scale.data import order

Count = Annotated[int, Field(ge=0, lt=COUNT_LIMIT)]
Size = Annotated[int, Field(gt=0, lt=COUNT_LIMIT)]


class Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class DomainForm(Form):
    tokens: Size
    content: str
    share: Count
    epoch: Count
    unit: Size
    token: Count
    seen: Count


class BlendForm(Form):
    start: Count
    seq_len: Size
    seed: Count
    domains: Annotated[dict[str, DomainForm], Field(min_length=1)]


class AdaptiveForm(Form):
    step: Count
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    teacher: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    text: dict[str, str]


class HealthForm(Form):
    in_a_row: Count
    rewinds: Count
    rewound_from: Count
    ground: str
    losses: list[Annotated[float, Field(allow_inf_nan=False)]]


class ProgressForm(Form):
    step: Count
    tokens: Count
    samples: Count
    blend: BlendForm | None
    adaptive: AdaptiveForm | None
    wandb_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")] | None  # becomes a folder's name
    identity: dict[str, Any]
    run: dict[str, Any] | None = None
    forks: list[Count] = []
    skipped: Count = 0
    health: HealthForm | None = None
    validation: Annotated[float, Field(allow_inf_nan=False)] | None = None


def checked(values) -> dict:
    """The values as they are, or a ValueError of one line."""
    try:
        ProgressForm.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        raise ValueError(f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}") from None
    if values["blend"]:
        check_blend(values["blend"], values["samples"])
    return values


def check_blend(blend: dict, samples: int) -> None:
    """Shares of a block, and of every corpus that gives some an epoch which holds a window, and a place in it."""
    if blend["start"] > samples:
        raise ValueError(f"blend.start must be at most samples ({samples})")
    rows = blend["domains"].values()
    if sum(row["share"] for row in rows) != order.BLOCK:
        raise ValueError(f"blend.domains.share must add up to {order.BLOCK}")
    for name, row in blend["domains"].items():
        if row["share"] and not order.units(row["tokens"], blend["seq_len"]):
            raise ValueError(f"blend.domains.{name}.tokens must hold a window of {blend['seq_len']}")
        if row["token"] > order.units(row["tokens"], row["unit"]) * row["unit"]:
            raise ValueError(f"blend.domains.{name}.token must be within its epoch")


PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands. With the shards beside it, all that a resume needs: the schedule follows from it."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # of this stage's data
    blend: dict | None = None  # blend.as_dict
    adaptive: dict | None = None  # feed.Measured
    skipped: int = 0  # steps whose update was dropped
    health: dict | None = None  # health.State
    wandb_id: str | None = None
    identity: dict = dataclasses.field(default_factory=dict)  # plan.identity
    run: dict | None = None  # the whole run file, resolved; earlier versions wrote none
    validation: float | None = None  # the student's loss, where it was measured at this very step
    forks: tuple[int, ...] = ()  # the step that each line of the run but the first began behind

    def advanced(self, samples: int, seq_len: int) -> "Progress":
        tokens = self.tokens + samples * seq_len
        return dataclasses.replace(
            self, step=self.step + 1, tokens=tokens, samples=self.samples + samples, validation=None
        )


def read_progress(checkpoint: Path) -> Progress:
    path = checkpoint / PROGRESS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be a progress file, but is not: {error}") from None
    return parse_progress(text, str(path))


def parse_progress(text: str, where: str) -> Progress:
    try:
        values = checked(parse_json(text))
        return Progress(**{**values, "forks": tuple(values.get("forks", ()))})
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} must be a progress file, but is not: {error}") from None


def progress_as_bytes(progress: Progress) -> bytes:
    return json.dumps(dataclasses.asdict(progress), indent=1).encode()
