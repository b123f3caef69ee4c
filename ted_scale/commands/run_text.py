"""A run file with comments: what was chosen and why, and the keys that users change most, with the defaults of config/.

Note: a line that begins with "#" and no space is a key at its default; without the "#" it says the same. So whatever the file
says of a default is checked by reading it.
"""

import json
from collections.abc import Mapping
from typing import Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ted_scale.commands.first_run import Choice
from ted_scale.config.run import Run
from ted_scale.config.run_file import annotation_parts, keys_of, section_in

WIDTH = 118
KEYS = {  # "" is the top; of each section the keys that most users change
    "": ("name", "method", "seed", "runs", "ds_config", "fused_blocks", "log_every"),
    "teacher": ("path", "placement", "precision", "every"),
    "student": ("path", "gradient_checkpointing"),
    "data": ("seq_len", "corpora", "attention", "sequence_parallel"),
    "data.blend": ("kind",),
    "data.stream": ("folder", "cache_gib"),
    "pairs": ("rule",),
    "filters": ("steps", "width", "start", "from"),
    "loss": ("preset", "ce", "kl", "layer", "temperature"),
    "train": (
        "steps", "epochs", "tokens_per_step", "micro_batch", "precision", "lr", "min_lr", "schedule", "warmup_steps", "clip",
        "weight_decay", "reduce_once",
    ),
    "validation": ("every", "tokens", "suite"),
    "checkpoint": ("every", "keep", "best", "copy_to"),
    "resume": ("allow",),
    "health": ("on_nonfinite", "on_spike"),
    "limits": ("step_s", "start_s"),
    "samples": ("every", "from_validation", "prompts"),
    "report": ("every_minutes",),
    "wandb": ("project", "mode", "entity", "tags"),
}  # fmt: skip
SAYS = {  # of sections, and of keys that config/ describes elsewhere or not at all
    "teacher": "The large model, which is not trained.",
    "student": "The small model, which is: a folder that ted-scale cut-student wrote, or any model with the teacher's tokenizer.",
    "data": "docs/data.md: more corpora, their weights, how they are blended and packed.",
    "data.blend": "With several corpora.",
    "data.stream": "Only for corpora under s3:// and msc://.",
    "pairs": "Which blocks of both models are compared.",
    "filters": "Maps of both models' states into one space; ted alone.",
    "loss": "Weights of the terms; docs/choosing.md says which helped when.",
    "train": "Steps, batch and optimizer.",
    "validation": "Held-out loss, of the student and at start and end of the teacher.",
    "checkpoint": "docs/checkpoints.md",
    "resume": "The same command continues the run; keys that may change then although they decide the result.",
    "health": "docs/health.md",
    "limits": "Seconds after which a hang is a hang.",
    "report": "runs/NAME/report.html: docs/report.md",
    "wandb": "Weights & Biases: online with an API key, offline without. Take the # of this section away.",
    "name": "of the run's folder, runs/NAME",
    "method": "ce: the text alone; kd: with the teacher's logits; lwd: with its states; ted: with filtered states",
    "seed": "of the order of the text and of what is drawn at the start",
    "ds_config": "how ZeRO-3 keeps weights and sends them: the README says which file when",
    "log_every": "steps",
    "loss.ce": "the next token of the text",
    "loss.kl": "the teacher's logits",
    "loss.layer": "the teacher's states; lwd and ted",
    "loss.preset": "fills what is not written here",
    "loss.temperature": "of the teacher's and the student's logits",
    "train.schedule": "of the learning rate, after the warm-up",
    "train.weight_decay": "of AdamW",
    "student.path": "local folder or hub id",
    "wandb.project": "of W&B",
    "wandb.entity": "a user or team",
}
OFF = {"wandb": {"project": "ted_scale"}}  # sections that are not written, with what they need


def text_of(choices: Mapping[str, Choice], head: list[str]) -> str:
    """`choices` by dotted key, the required keys among them."""
    parts = [comment(line) for line in head]
    for section, keys in (KEYS | others()).items():
        parts += section_of(section, keys, choices)
    return "\n".join(parts) + "\n"


def others() -> dict[str, tuple[str, ...]]:
    """Sections that KEYS does not know, with all of their keys."""
    sections = {name: section_in(field.annotation) for name, field in keys_of(Run).items() if field.default is not None}
    return {name: tuple(keys_of(model)) for name, model in sections.items() if model and name not in KEYS}


def section_of(section: str, keys: tuple[str, ...], choices: Mapping[str, Choice]) -> list[str]:
    fields, off = keys_of(model_of(section)), OFF.get(section)
    lines = (
        []
        if not section
        else ["", comment(SAYS.get(section) or str(model_of(section).__doc__)), f"{'#' if off else ''}[{section}]"]
    )
    for key in keys:
        dotted = f"{section}.{key}".lstrip(".")
        if dotted in choices:
            lines += [comment(choices[dotted].why), written(key, choices[dotted].value)]
        else:
            lines += at_default(key, fields[key], said_of(dotted, fields[key]), off or {})
    return [line for line in lines if line is not None]


def at_default(key: str, field, said: str, needed: dict) -> list[str | None]:
    """A key that is not set has no value to show."""
    value = needed.get(key, field.get_default(call_default_factory=True))
    if value is None:
        return [comment(f"{key} is not set{f': {said}' if said else ''}")]
    if value is PydanticUndefined:
        raise KeyError(f"{key} has no default and was not chosen")
    return [comment(said) if said else None, f"#{written(key, value)}"]


def said_of(dotted: str, field) -> str:
    """The field's own description, and the words it may have."""
    said = SAYS.get(dotted, field.description or "")
    words = [
        json.dumps(word)
        for part in annotation_parts(field.annotation)
        if get_origin(part) is Literal
        for word in get_args(part)
    ]
    missing = [word for word in dict.fromkeys(words) if word.strip('"') not in said]
    return "; ".join(filter(None, [said, f"one of {', '.join(dict.fromkeys(words))}" if missing else ""]))


def model_of(section: str) -> type[BaseModel]:
    model: type[BaseModel] = Run
    for name in filter(None, section.split(".")):
        model = section_in(keys_of(model)[name].annotation)
    return model


def written(key: str, value) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = ("{ " + ", ".join(written(k, v) for k, v in row.items()) + " }" for row in value)
        return f"{key} = [{', '.join(rows)}]"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{key} = {value:_}"
    return tomli_w.dumps({key: value}).strip()


def comment(words: str) -> str:
    """One "# " line, or several."""
    lines, line = [], ""
    for word in words.split():
        if line and len(line) + len(word) + 1 > WIDTH:
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
    return "\n".join(f"# {each}".rstrip() for each in [*lines, line])
