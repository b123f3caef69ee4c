"""With which run file a run may go on from a checkpoint: what differs, key by key, and what of it matters.

What decides the result (model, filters, loss, optimizer) must stay, unless resume.allow names it; everything else may
change and is said. plan.py tells this file what a run is (Plan.identity), folder.py keeps it. The surprise: a
few keys cannot even be allowed, because the checkpoint's tensors would not fit, and which ones depends on where it
stands: stage I's length may change only while stage I goes on.
"""

import difflib
import json

from ted_scale.base.errors import UserError, shown
from ted_scale.base.parsing import is_count

SHAPE = ("family", "layers", "width", "vocab_size", "parameters")
DECISIVE = (
    "method", "seed", "pairs",
    "filters.steps", "filters.head", "filters.width", "filters.mlp",
    "loss.ce", "loss.kl", "loss.layer", "loss.temperature", "loss.kind",
    "train.precision", "train.betas", "train.eps", "train.weight_decay",
    *(f"student.{key}" for key in SHAPE), *(f"teacher.{key}" for key in SHAPE),
)  # fmt: skip

DROPPED = ("data.workers",)  # keys of earlier versions that never changed a result

NEVER = ("filters.width", "filters.mlp")


def unknown_name(name: str) -> str | None:
    """The rest of a sentence about a name that resume.allow does not know."""
    if name in DECISIVE:
        return None
    close = difflib.get_close_matches(name, DECISIVE, n=1)
    return f"did you mean {close[0]}?" if close else "what it does not know may change without it, or cannot"


def differences(theirs: dict, ours: dict) -> list[str]:
    """Keys of what both sides know: an earlier version of this project knew fewer, and `method` decides which there are."""
    return [key for key in theirs if key in ours and theirs[key] != ours[key]]


def refuse_another_run(where, theirs: dict, ours: dict, allowed: list[str], step: int) -> None:
    """Every difference that matters in one sentence, if one of them is not allowed."""
    found = differences(theirs, ours)
    never = [key for key in found if cannot_load(key, theirs, ours, step)]
    refused = [key for key in found if key in never or key not in allowed]
    if not refused:
        return
    out = (
        f"to resume from {where}, {listed(refused, theirs, ours)}; set back what changed, or give the run another name"
    )
    if allow := [key for key in refused if key not in never]:
        out += f", or accept it by resume.allow = {json.dumps([*allowed, *allow])}"
    if never:
        out += f"; {' and '.join(never)} cannot be allowed, for the tensors of the checkpoint would not fit"
    raise UserError(out)


def refuse_other_filters(path, theirs: dict, ours: dict) -> None:
    """Stage I of another run, whose filters this one's stage II would take."""
    if found := [key for key in ours if theirs.get(key) != ours[key]]:
        raise UserError(
            f"to take filters from {path}, {listed(found, theirs, ours)}; set back what differs, or leave filters.from out"
        )


def listed(keys: list[str], theirs: dict, ours: dict) -> str:
    return ", and ".join(f"{key} must be {shown(theirs.get(key))}, but is {shown(ours[key])}" for key in keys)


def cannot_load(key: str, theirs: dict, ours: dict, step: int) -> bool:
    """Would a checkpoint of `step` have other tensors, or tensors of another stage, than the run with this difference?"""
    old, new = theirs[key], ours[key]
    if key == "method":
        return [old, new] not in (["ce", "kd"], ["kd", "ce"])  # who matches layers has filters
    if key == "pairs":
        return not isinstance(old, list) or len(old) != len(new)
    if key == "filters.steps":
        return not (is_count(old) and step <= old and step < new)
    if key == "filters.head":
        return "per_layer" in (old, new) and step < ours["filters.steps"]
    if key == "teacher.width":
        return "pairs" in ours
    return key in NEVER or key.startswith("student.")


def changes(theirs: dict, ours: dict, written: dict | None, run: dict, step: int) -> list[str]:
    """What a run must say of a run file that it goes on with, a sentence a key: what was allowed, and what may change."""
    said = {key: (theirs[key], ours[key]) for key in differences(theirs, ours)}
    if written is not None:
        before, now = {key: value for key, value in flat(written).items() if key not in DROPPED}, flat(run)
        keys = (key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key))
        said |= {key: (before.get(key), now.get(key)) for key in keys}
    return [f"{key} is {shown(new)} instead of {shown(old)} from step {step} on" for key, (old, new) in said.items()]


def flat(values: dict, prefix: str = "") -> dict:
    """Dotted names of a run file's values; rows of a table of corpora by their names. What is not set is left out."""
    rows = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            value = {row.get("name", number): row for number, row in enumerate(value)}
        if isinstance(value, dict):
            rows |= flat(value, f"{name}.")
        elif value is not None:
            rows[name] = value
    return rows


def plain(value):
    """A value of the run file as JSON gives it back."""
    return json.loads(json.dumps(value, default=lambda section: section.model_dump(mode="json")))


def as_written(run) -> dict:
    """The resolved run file as a checkpoint keeps it."""
    return run.model_dump(mode="json", by_alias=True)
