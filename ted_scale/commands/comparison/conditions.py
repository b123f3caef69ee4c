"""What the arms of a comparison must have in common, and what its table says of those that have not.

Note: what a path names may change between two runs, so each run is also held to the held-out loss with which it began.
"""

import math
from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import parse_toml
from ted_scale.config.changes import said
from ted_scale.config.run import Run

EQUAL = ("student", "teacher.path", "teacher.init", "data", "train.tokens_per_step", "validation")
STARTS = ("student.path", "student.init", "teacher.path", "teacher.init")
ALIKE = 1e-3  # of a held-out loss: other programs round otherwise, and any training changes more


def refuse_unequal(runs: dict[str, Run], base: str, differ: list[str], ours) -> None:
    for arm, key, value, others in differences(runs, base):
        if not named(key, differ) and not named(key, ours):
            raise UserError(
                f"arms.{arm} must have the {key} of arms.{base_of(runs, base, key)} ({said(others)}), but has "
                f"{'none' if value is None else said(value)}; if that is what is compared, put {key} into differ"
            )


def differences(runs: dict[str, Run], base: str):
    """(arm, key, its value, that of the arm it is compared with)"""
    flat = {arm: flattened("", run.model_dump(by_alias=True)) for arm, run in runs.items()}
    for arm, values in flat.items():
        for key in sorted({*values, *flat[base]}):
            mine, others = part(values, key), part(flat[base_of(runs, base, key)], key)
            asked = not key.startswith("teacher.") or runs[arm].method != "ce"
            if named(key, EQUAL) and asked and mine != others:
                yield arm, key, mine, others


def part(flat: dict, key: str):
    """The value of a key, or the section of this name as a dict: one side may have none of it, and its key then has no value."""
    inside = {name.removeprefix(f"{key}."): value for name, value in flat.items() if name.startswith(f"{key}.")}
    return inside or flat.get(key)


def base_of(runs: dict[str, Run], base: str, key: str) -> str:
    """The arm that a key is compared with: of a teacher's, the first arm that asks one, if the baseline does not."""
    if not key.startswith("teacher.") or runs[base].method != "ce":
        return base
    return next((arm for arm, run in runs.items() if run.method != "ce"), base)


def flattened(prefix: str, value) -> dict:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: v for name, inner in value.items() for key, v in flattened(f"{prefix}.{name}".lstrip("."), inner).items()
    }


def named(key: str, names) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def starts_of(runs: dict[str, Run], base: str) -> dict[str, list[str]]:
    """Of each arm, what the plan says of its start: another model than the baseline's, filters that another run made."""
    starts = {arm: filters_of(run) for arm, run in runs.items()}
    for arm, key, value, _ in differences(runs, base):
        if key in STARTS:
            starts[arm].append(f"{key} = {said(value)}")
    return starts


def filters_of(run: Run) -> list[str]:
    """Tokens that made an arm's filters before it began are in no budget."""
    if run.method != "ted" or not run.filters.from_run:
        return []
    folder = Path(run.filters.from_run)
    try:
        written = parse_toml((folder / "run.toml").read_text(encoding="utf-8"))
        tokens = written["filters"]["steps"] * written["train"]["tokens_per_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"filters of {folder}"]
    return [f"filters of {folder}" + (f", which read {tokens:,} tokens before" if tokens else "")]


def began_elsewhere(firsts: dict[int, float], others: dict[int, float]) -> str | None:
    """Of the held-out losses before training, by seed: those of equal seeds must agree."""
    for seed in sorted(firsts.keys() & others.keys()):
        if not math.isclose(firsts[seed], others[seed], rel_tol=ALIKE):
            return f"began at {firsts[seed]:.4f}, not {others[seed]:.4f}"
    return None
