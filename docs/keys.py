"""Writes keys.md, the reference of the run file, from ted_scale/config: python docs/keys.py

A key's meaning is the description of its field, and stands nowhere else. tests/test_docs.py fails if keys.md differs from this
output.
"""

import json
import typing
from pathlib import Path
from types import NoneType, UnionType

from ted_scale.base.parsing import COUNT_LIMIT
from ted_scale.config.changes import DECISIVE, NEVER
from ted_scale.config.method import PRESETS, Schedule
from ted_scale.config.run import Run
from ted_scale.config.run_file import keys_of, section_in

INSTEAD = {"train.steps": "**must be set**, or `epochs`"}  # a default that only the code sees
PAGE = Path(__file__).with_name("keys.md")
OPENING = """# Every key of the run file

`python docs/keys.py` writes this page from the code of `ted_scale/config/`; do not edit it. A run file is TOML. A key that is not
on this page is refused, and the error names the nearest key. `--set section.key=value` sets a key on the command line.
`--dry-run` prints the run file with all its defaults.

**Resume** says whether a key may differ from the checkpoint from which a run continues: *free* (the log says what changed), *by
name* (it decides the result, so `resume.allow` must name it), or *no*. If the checkpoint's tensors would not fit, the key is
refused even by name, and the error says so. The shapes of both models decide the result, too. See [checkpoints](checkpoints.md).
"""


def page() -> str:
    return "\n".join([OPENING, *sections(Run, ""), *presets()])


def sections(section, prefix: str) -> list[str]:
    """A table of the section's own keys, and then the tables of the sections inside it."""
    fields = {f"{prefix}{key}": field for key, field in keys_of(section).items()}
    inner = {name: section_in(field.annotation) for name, field in fields.items()}
    title = f"## [{prefix.rstrip('.')}]" if prefix else "## At the top"
    rows = [row(name, field) for name, field in fields.items() if inner[name] in (None, Schedule)]
    about = [" ".join(section.__doc__.split()), ""] if section.__doc__ and prefix else []
    out = [
        title,
        "",
        *about,
        "| key | value | default | resume | meaning |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]
    for name, other in inner.items():
        if other and (other is not Schedule or name == "loss.ce"):
            out += sections(other, "loss.WEIGHT." if other is Schedule else f"{name}.")
    return out


def row(name: str, field) -> str:
    default = "**must be set**" if field.is_required() else INSTEAD.get(name, shown(field.default))
    cells = (f"`{name}`", value_of(field.annotation, field.metadata), default, on_resume(name), field.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def on_resume(name: str) -> str:
    if name in NEVER:
        return "no"
    return "by name" if name in DECISIVE or name.split(".")[0] in DECISIVE or name.startswith("loss.WEIGHT") else "free"


def shown(value) -> str:
    """A default as TOML has it."""
    return "" if value is None else f"`{json.dumps(value)}`"


def value_of(annotation, metadata=()) -> str:
    """The values that a key takes, in words."""
    if typing.get_origin(annotation) is typing.Annotated:
        base, *more = typing.get_args(annotation)
        return value_of(base, [m for each in more for m in getattr(each, "metadata", [each])])
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{json.dumps(part)}`" for part in parts)
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return " or ".join(value_of(part, metadata) for part in parts if part is not NoneType)
    if typing.get_origin(annotation) in (list, tuple):
        is_open = typing.get_origin(annotation) is list or ... in parts
        return f"[{', '.join(value_of(part) for part in parts if part is not ...)}{', …' if is_open else ''}]"
    if section_in(annotation):
        return "a table as in [loss.WEIGHT]"
    return NAMES[annotation] + bounds(metadata)


NAMES = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}


def bounds(metadata) -> str:
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "to", "multiple_of": "in steps of"}
    found = {key: getattr(one, key) for key in words for one in metadata if hasattr(one, key)}
    if "ge" in found:
        found.pop("gt", None)  # of Seconds, where a key asks for more
    return "".join(f" {words[key]} {limit:g}" for key, limit in found.items() if limit != COUNT_LIMIT)


def presets() -> list[str]:
    rows = [f"| `{name}` | `{json.dumps(values)}` |" for name, values in PRESETS.items()]
    return ["## What a preset fills in", "", "| `loss.preset` | the keys of [loss] |", "| --- | --- |", *rows, ""]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
