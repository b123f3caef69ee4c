"""Whether a run may continue from a checkpoint of another run file: which keys differ, and which of these matter.

A key that decides the result (model, filters, loss, optimizer) must not change, unless resume.allow names it. Everything else may
change and is logged. The deciding keys come from Plan.identity, and a checkpoint keeps them. Note: a few keys cannot be allowed,
because the checkpoint's tensors would not fit, or would mean something else. Which keys these are depends on the step. For
example, the length of stage I may change only during stage I.
"""

import difflib
import json

from ted_scale.base.errors import UserError, shown
from ted_scale.base.parsing import is_count

SHAPE = ("family", "layers", "width", "vocab_size", "parameters")
DECISIVE = (
    "method", "seed", "pairs", "teacher.every", "teacher.precision",
    "filters.steps", "filters.head", "filters.width", "filters.mlp",
    "loss.ce", "loss.kl", "loss.layer", "loss.balance", "loss.temperature", "loss.kind", "loss.divergence", "loss.top_k",
    "loss.skip_low_entropy", "loss.tokens",
    "train.precision", "train.betas", "train.eps", "train.weight_decay",
    "student.lora.rank", "student.lora.alpha", "student.lora.targets", "student.base",
    *(f"student.{key}" for key in SHAPE), *(f"teacher.{key}" for key in SHAPE),
)  # fmt: skip

DROPPED = ("data.workers",)  # keys of earlier versions that never changed a result

NEVER = ("filters.width", "filters.mlp")
ADAPTED = ("student.lora.alpha", "student.base")  # the weights to which adapters are added, and the adapters' factor
IMPLIED = {
    "teacher.precision": "16 bits or more",
    "student.lora.rank": 0,
}  # in a checkpoint that is older than the key


def unknown_name(name: str) -> str | None:
    """The rest of a sentence about a name that resume.allow cannot have. None for a name that it can have."""
    if name in DECISIVE:
        return None
    close = difflib.get_close_matches(name, DECISIVE, n=1)
    return f"did you mean {close[0]}?" if close else "other keys may change without it, or cannot change"


def differences(theirs: dict, ours: dict) -> list[str]:
    """The keys that both sides have and that differ. Earlier versions had fewer keys, and `method` also decides which keys
    exist."""
    return [key for key in theirs if key in ours and without_none(theirs[key]) != without_none(ours[key])]


def without_none(value):
    """A value without keys that are None. A schedule of an earlier version lacks newer keys, which are None if they are not
    used."""
    return {key: v for key, v in value.items() if v is not None} if isinstance(value, dict) else value


def refuse_another_run(where, theirs: dict, ours: dict, allowed: list[str], step: int) -> None:
    """Raise one sentence with every difference that is not allowed, if there is one."""
    theirs = IMPLIED | theirs
    found = differences(theirs, ours)
    never = [key for key in found if cannot_load(key, theirs, ours, step)]
    refused = [key for key in found if key in never or key not in allowed]
    if not refused:
        return
    out = (
        f"to resume from {where}, {listed(refused, theirs, ours)}; set back what changed, or give the run another name"
    )
    if allow := [key for key in refused if key not in never]:
        keys = json.dumps([*allowed, *allow])
        out += f", or accept it by --set 'resume.allow={keys}', in the run file the line allow = {keys} below [resume]"
    raise UserError(out + why_never(never))


def why_never(keys: list[str]) -> str:
    reasons = {
        "the tensors of the checkpoint would not fit": [key for key in keys if key not in ADAPTED],
        "the adapters of the checkpoint were trained with what it was": [key for key in keys if key in ADAPTED],
    }
    return "".join(
        f"; {' and '.join(keys)} cannot be allowed, because {reason}" for reason, keys in reasons.items() if keys
    )


def refuse_other_filters(path, theirs: dict, ours: dict) -> None:
    """Refuse filters from stage I of another run if they do not fit this run's stage II."""
    if found := [key for key in ours if theirs.get(key) != ours[key]]:
        raise UserError(
            f"to take filters from {path}, {listed(found, theirs, ours)}; set back what differs, or leave filters.from out"
        )


def listed(keys: list[str], theirs: dict, ours: dict) -> str:
    return ", and ".join(differs(key, theirs.get(key), ours[key]) for key in keys)


def differs(key: str, theirs, ours) -> str:
    if key == "student.lora.rank" and theirs == 0:  # a rank that no run file can have
        return "student.lora must be left out, for that checkpoint is of a whole student, but is set"
    if key == "student.lora.rank" and ours == 0:
        return "student.lora must be set, for that checkpoint is of adapters alone, but is left out"
    return f"{key} must be {said(theirs)}, but is {said(ours)}"


def said(value) -> str:
    """TOML has no null: a key without a value is left out."""
    return "not set" if value is None else shown(without_none(value))


def cannot_load(key: str, theirs: dict, ours: dict, step: int) -> bool:
    """Whether this difference would give the run another stage, or other tensors than the checkpoint of `step` has."""
    old, new = theirs[key], ours[key]
    if key == "method":
        return [old, new] not in (["ce", "kd"], ["kd", "ce"])  # the other methods have filters
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
    """What a run logs when it continues with another run file: a sentence for each change, allowed or free."""
    theirs = IMPLIED | theirs
    found = {key: (theirs[key], ours[key]) for key in differences(theirs, ours)}
    if written is not None:
        before, now = {key: value for key, value in flat(written).items() if key not in DROPPED}, flat(run)
        keys = (key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key))
        found |= {key: (before.get(key), now.get(key)) for key in keys}
    return [f"{key} is {said(new)} instead of {said(old)} from step {step} on" for key, (old, new) in found.items()]


def flat(values: dict, prefix: str = "") -> dict:
    """A run file's values by dotted names. Rows of the table of corpora are named by their corpora. Unset keys are left out."""
    rows = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            value = {str(row.get("name", number)): row for number, row in enumerate(value)}
        if isinstance(value, dict):
            rows |= flat(value, f"{name}.")
        elif value is not None:
            rows[name] = value
    return rows


def plain(value):
    """A value of the run file as JSON would return it."""
    return json.loads(json.dumps(value, default=lambda section: section.model_dump(mode="json", exclude_none=True)))


def as_written(run) -> dict:
    """The resolved run file as a checkpoint keeps it."""
    return run.model_dump(mode="json", by_alias=True)
