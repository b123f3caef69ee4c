"""Read run files strictly, apply `--set section.key=value`, and write run files. A mistake becomes one sentence."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import tomli_w
from pydantic import BaseModel, ValidationError

from ted_scale.base.errors import UserError, shown
from ted_scale.base.parsing import parse_toml
from ted_scale.base.shipped import found
from ted_scale.config.run import Run

LARGEST = 2**24  # bytes
REPLACED = {"data.mask_documents": "data.attention = 'document'"}
INSTEAD = {
    "train.steps": ("epochs", "epochs_of"),
    "train.epochs": ("steps",),
}  # the keys of the section that a --set of another key replaces
# The names of our keys in other trainers.
CALLED = {
    "learning_rate": "train.lr", "max_lr": "train.lr", "min_learning_rate": "train.min_lr", "max_steps": "train.steps",
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs",
    "batch_size": "train.micro_batch", "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch", "global_batch_size": "train.tokens_per_step",
    "gradient_accumulation_steps": "train.tokens_per_step", "gradient_accumulation": "train.tokens_per_step",
    "max_grad_norm": "train.clip", "gradient_clipping": "train.clip", "bf16": "train.precision", "dtype": "train.precision",
    "lr_scheduler_type": "train.schedule", "sequence_length": "data.seq_len", "max_seq_length": "data.seq_len",
    "max_length": "data.seq_len", "output_dir": "runs", "run_name": "name", "save_steps": "checkpoint.every",
    "eval_steps": "validation.every", "logging_steps": "log_every",
}  # fmt: skip


def load_run(path: str | Path, overrides: Sequence[str] = (), argument: str = "--config") -> Run:
    """Read a run file and apply `section.key=value` strings. A mistake is one UserError sentence. It names the file, or the --set
    with the mistake. If there is no file, it names the argument that should have given one."""
    try:
        with found(path).open("rb") as file:  # the file may be a pipe of the user's
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        text = content.decode("utf-8-sig")  # editors of Windows begin with a mark
    except OSError as error:
        raise UserError(f"{argument} must name a readable run file, but {path} is not: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} must be valid TOML, but is not: {one_line(error)}") from None
    run = put_together(path, text, overrides)
    if isinstance(run, Run):
        return run
    first = next(n for n in range(len(overrides) + 1) if put_together(path, text, overrides[:n]) == run)
    key = overrides[first - 1].partition("=")[0] if first else None
    raise UserError(f"{path if key is None else f'--set {key.strip()}'}: {run}")


def put_together(path: str | Path, text: str, overrides: Sequence[str]) -> Run | str:
    """The run, or a sentence about its first mistake."""
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise UserError(f"{path} must be valid TOML, but is not: {one_line(error)}") from None
    for override in overrides:
        put(values, override)
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        return sentence(error)
    except RecursionError:
        raise UserError(f"{path} must be a run file, but is nested too deeply to be one") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def put(values: dict, override: str) -> None:
    """Set one `section.key=value`. The value is TOML; a bare word is a string. If two keys exclude each other, the key that is
    set replaces the other."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set must look like section.key=value, but is {shown(override)}")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text
    *sections, key = dotted.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set must name a key of a section, but {section} in {shown(override)} is not a section")
    for replaced in INSTEAD.get(dotted.strip(), ()):
        values.pop(replaced, None)
    values[key] = value


def sentence(error: ValidationError, root: type[BaseModel] = Run) -> str:
    """The first mistake of a run file as a sentence in this project's form. With `root`, of another file with those sections."""
    fault = min(error.errors(), key=how_far_from_the_cause)
    names, section = where(fault["loc"], root)
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    if fault["type"] == "extra_forbidden":
        return unknown_key(f"{dotted}." if dotted else "", str(fault["loc"][-1]), section)
    if fault["type"] == "missing":
        return f"{dotted} must be set, but is missing"
    if fault["type"] == "model_type":
        return f"{dotted} must be a section of keys, but is {shown(fault['input'])}"
    if fault["type"] == "value_error":  # our own error: it begins with the key, relative to the section
        message = fault["msg"].removeprefix("Value error, ")
        return f"{dotted}.{message}" if dotted else message
    wanted = fault["msg"].partition(" should ")[2].partition(" after validation")[0].replace("tuple", "list")
    return f"{dotted} must {wanted}, but is {shown(fault['input'])}"


def how_far_from_the_cause(fault) -> int:
    """A rank for sorting. Among the errors of a union, those of the branch that the user did not write come last."""
    other_branch = fault["type"] in ("model_type", "dict_type") or isinstance(fault["input"], dict)
    return {"extra_forbidden": 0, "missing": 1}.get(fault["type"], 3 if other_branch else 2)


def where(location, root: type[BaseModel]) -> tuple[list, type]:
    """(the keys and indices on pydantic's path to an error, the last section on the path). Names of a union's branches are left
    out."""
    names, section = [], root
    for part in location:
        field = keys_of(section).get(part)
        if field is not None or isinstance(part, int):
            names.append(part)
        section = (field and section_in(field.annotation)) or section
    return names, section


def unknown_key(parent: str, key: str, section: type[BaseModel]) -> str:
    """A sentence about an unknown key. It suggests the key that replaced it, else a similar key, else a section that has the
    key."""
    if (new := REPLACED.get(f"{parent}{key}")) is not None:
        return f"unknown key {parent}{key}; write {new} instead"
    close = [parent + k for k in difflib.get_close_matches(key, sorted(keys_of(section)), n=1)]
    others = {name: section_in(field.annotation) for name, field in keys_of(Run).items()}
    close = close or ([CALLED[key]] if key in CALLED else [])
    close = close or [f"{name}.{key}" for name, other in others.items() if other and key in keys_of(other)]
    return f"unknown key {parent}{key}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def keys_of(section: type[BaseModel]) -> dict:
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_in(annotation) -> type[BaseModel] | None:
    """The section in a key's type, which may be alone, in a list or beside None."""
    found = (p for p in annotation_parts(annotation) if isinstance(p, type) and issubclass(p, BaseModel))
    return next(found, None)


def annotation_parts(annotation) -> list:
    """A type and all types inside it."""
    nested = [p for arg in getattr(annotation, "__args__", ()) for p in annotation_parts(arg)]
    return [annotation, *nested]


def to_toml(run: Run) -> str:
    """The resolved run as TOML, which `load_run` can read. It has steps when they are known, and then no epochs. Keys that are
    None are left out, because TOML has no null."""
    return tomli_w.dumps(run.model_dump(by_alias=True, exclude_none=True, exclude={"train": not_written(run)}))


def not_written(run: Run) -> set[str]:
    return {"epochs", "epochs_of"} if run.train.steps else {"steps"}
