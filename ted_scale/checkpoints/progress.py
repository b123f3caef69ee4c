"""The progress of a run: one record that functions pass on, and that a checkpoint keeps as progress.json.

pydantic checks every field when a file is read, because the file decides which data are read and what is sent to W&B. Records
that the program makes are not checked.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from ted_scale.base import sealed
from ted_scale.base.errors import UserError
from ted_scale.base.parsing import parse_json
from ted_scale.checkpoints.life import Spent
from ted_scale.config.types import Count
from ted_scale.data.blend import BlendRecord, check_record

PROGRESS = "progress.json"
STRICT = ConfigDict(strict=True, extra="ignore")
Finite = Annotated[float, Field(allow_inf_nan=False)]
RunId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")]  # it becomes a folder's name


@with_config(STRICT)
class Measured(TypedDict):
    """The last measurement of an adaptive blend: weights set at `step`, the teacher's losses, and the text of these losses."""

    step: Count
    weights: dict[str, Annotated[Finite, Field(ge=0)]]
    teacher: dict[str, Finite]
    text: dict[str, str]


@dataclass(frozen=True)
class Health:
    """What spikes.py compares a loss with, and its counts beside Progress.skipped."""

    __pydantic_config__ = STRICT

    in_a_row: Count = 0  # number of dropped updates in a row, up to the last step
    rewinds: Count = 0  # since the last step beyond `rewound_from`
    rewound_from: Count = 0  # the furthest step whose spike sent the run back
    ground: str = ""  # a digest of what decides the values of `losses` (spikes.py)
    losses: Sequence[Finite] = ()  # the watched loss of the last steps with an update


@dataclass(frozen=True)
class Balance:
    """Means of KL and layer loss over the steps that had both. balance.py computes them."""

    __pydantic_config__ = STRICT

    of: str = ""  # the settings that decide the terms' values
    kl: Finite = 0.0
    layer: Finite = 0.0
    steps: Count = 0


@dataclass(frozen=True)
class Progress:
    """Everything that a resume needs besides the ranks' files. Learning rate and loss weights follow from it."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    step: Count = 0
    tokens: Count = 0
    samples: Count = 0  # of this stage's data
    blend: BlendRecord | None = None
    adaptive: Measured | None = None
    skipped: Count = 0  # steps whose update was dropped
    health: Health | None = None
    balance: Balance | None = None
    entropy_floor: Annotated[Finite, Field(ge=0)] = 0.0  # from the last step, for loss.skip_low_entropy
    wandb_id: RunId | None = None
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)  # plan.identity
    run: dict[str, Any] | None = None  # the whole resolved run file; earlier versions wrote none
    validation: Finite | None = None  # the student's loss, if it was measured at this step
    scores: dict[str, Finite] = dataclasses.field(default_factory=dict)  # the number of checkpoint.best, if measured
    spent: Spent | None = None  # the run's time until this step
    forks: tuple[Count, ...] = ()  # for each line (folder.py) after the first: the step after which it began

    def advanced(self, samples: int, seq_len: int) -> "Progress":
        tokens = self.tokens + samples * seq_len
        return dataclasses.replace(
            self, step=self.step + 1, tokens=tokens, samples=self.samples + samples, validation=None, scores={}
        )


READER = TypeAdapter(Progress)
ALWAYS_WRITTEN = {"step", "tokens", "samples", "blend", "adaptive", "wandb_id", "identity"}  # in every version


def read_progress(checkpoint: Path) -> Progress:
    """Read a checkpoint's progress.json. A UserError if it is damaged or something else."""
    path = checkpoint / PROGRESS
    try:
        text = sealed.read(checkpoint, PROGRESS, sealed.read_text)
    except (sealed.Damaged, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be a progress file, but is not: {error}") from None
    return parse_progress(text, str(path))


def parse_progress(text: str, where: str) -> Progress:
    try:
        return checked(text)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        said = f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}"
    except ValueError as error:
        said = str(error)
    raise UserError(f"{where} must be a progress file, but is not: {said}")


def checked(text: str) -> Progress:
    progress = READER.validate_json(text)
    if missing := ALWAYS_WRITTEN - parse_json(text).keys():
        raise ValueError(f"it has no {min(missing)}")
    if progress.blend:
        check_record(progress.blend, progress.samples)
    return progress


def progress_as_bytes(progress: Progress) -> bytes:
    return json.dumps(dataclasses.asdict(progress), indent=1).encode()
