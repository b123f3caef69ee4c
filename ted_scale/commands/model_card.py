"""The model card of an export: what was distilled from what, on what, how, and with which numbers.

Note: names in it may be a stranger's, so each is redacted, loses what moves a cursor, and is escaped as Markdown.
"""

import importlib.metadata
import re
from pathlib import Path

from ted_scale.base.redact import printable, redact
from ted_scale.commands.card_facts import Facts, Side, gather
from ted_scale.config.method import Schedule
from ted_scale.config.models import Lora
from ted_scale.config.run import Run

UNKNOWN = "not recorded"
METHODS = {
    "ce": "next-token loss alone, without a teacher",
    "kd": "distillation of the teacher's logits, with the next-token loss",
    "lwd": "layer-wise distillation of the teacher's states, with logits and the next-token loss",
    "ted": "TED, task-aware layer-wise distillation: filtered states of both models, with logits and the next-token loss",
}
PACKAGES = ("ted_scale", "torch", "transformers", "deepspeed")
TED = """@inproceedings{liang2023ted,
  title     = {Less is More: Task-aware Layer-wise Distillation for Language Model Compression},
  author    = {Liang, Chen and Zuo, Simiao and Zhang, Qingru and He, Pengcheng and Chen, Weizhu and Zhao, Tuo},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  url       = {https://arxiv.org/abs/2210.01351}
}"""


def write_card(out: Path, folder: Path, checkpoint: Path, run: Run, student: Path, dtype: str) -> None:
    (out / "README.md").write_text(card(gather(folder, checkpoint, run, student), dtype), encoding="utf-8")


def card(facts: Facts, dtype: str) -> str:
    parts = [
        f"---\n{front_matter(facts)}\n---\n\n# {safe(facts.run.name)}",
        introduction(facts),
        "## What it was made of\n\n" + table(["", ""], made_of(facts, dtype)),
        "## Held-out loss\n\n" + losses(facts),
        "## Text\n\n" + texts(facts),
        "## Training\n\n" + table(["", ""], training(facts)),
        "## Compute\n\n" + table(["", ""], compute(facts)),
        "## Limits\n\n" + limits(facts),
        "## Use\n\n" + USE,
        f"## Reference\n\n```bibtex\n{TED}\n```" if facts.run.method == "ted" else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```"""


def front_matter(facts: Facts) -> str:
    """Neither licence nor language nor data set: no file of a run says them."""
    from huggingface_hub import ModelCardData

    sides = [side.hub_id for side in (facts.student, facts.teacher) if side and side.hub_id]
    tags = ["ted_scale", *(["distillation", facts.run.method] if facts.teacher else [])]
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=tags,
        base_model=[redact(printable(name)) for name in dict.fromkeys(sides)] or None,
    )  # fmt: skip
    return data.to_yaml()


def introduction(facts: Facts) -> str:
    of = f"distilled from {safe(facts.teacher.name)}" if facts.teacher else "trained"
    return (
        f"A causal language model, {of} by ted_scale's method `{facts.run.method}`: "
        f"{METHODS[facts.run.method]}. This card is written from the files of the run alone; what they do not have is marked as "
        f"{UNKNOWN}."
    )


def made_of(facts: Facts, dtype: str) -> list[list[str]]:
    start = ", cut from a teacher" if facts.was_cut else ""
    rows = [["teacher", model(facts.teacher)]] if facts.teacher else []
    adapters = [["adapters", trained_by(facts.run.student.lora)]] if facts.run.student.lora else []
    return [
        *rows,
        ["student's start", model(facts.student) + start],
        *adapters,
        ["method", METHODS[facts.run.method]],
        ["checkpoint", f"step {facts.progress.step:,}" + (f" of {facts.planned:,}" if facts.planned else "")],
        ["weights", dtype],
    ]


def model(side: Side) -> str:
    shape = side.shape or f"shape {UNKNOWN}"
    return f"{safe(side.name)}: {safe(shape)}; fingerprint {side.fingerprint or UNKNOWN}"


def trained_by(lora: Lora) -> str:
    targets = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    named = ", ".join(map(safe, targets))
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {named}; merged here, all other weights are the start's"


def losses(facts: Facts) -> str:
    """Mean loss of a token in nats."""
    if all(value is None for value in facts.held[""]):
        return f"It is {UNKNOWN}: the run held out no text, or has not validated yet."
    found = {name: held for name, held in facts.held.items() if any(value is not None for value in held)}
    rows = [[safe(name) or "all", *map(number, held)] for name, held in found.items()]
    said = "Nats a token, on text that was held out from the run's own corpora.\n\n"
    head = ["text", "student, before", f"student, at step {facts.progress.step:,}", "teacher"]
    columns = len(head) if facts.teacher else len(head) - 1
    return said + table(head[:columns], [row[:columns] for row in rows])


def texts(facts: Facts) -> str:
    rows = [
        [
            safe(text.name),
            f"{text.weight:g}",
            text.tokens or UNKNOWN,
            text.held_out or UNKNOWN,
            read(text, counts_epochs=facts.run.data.packing == "windows"),
            text.digest or UNKNOWN,
        ]
        for text in facts.texts
    ]
    return table(["corpus", "weight", "tokens to train on", "held out", "read, and epochs", "digest"], rows)


def read(text, *, counts_epochs: bool) -> str:
    """Rows of whole examples are padded, and the padding is among the tokens read: no epochs follow from them."""
    if text.read is None:
        return UNKNOWN
    whole = int(text.tokens.replace(",", "")) if text.tokens else 0
    return f"{text.read:,}" + (f", {text.read / whole:.3g} epochs" if whole and counts_epochs else "")


def training(facts: Facts) -> list[list[str]]:
    run, train = facts.run, facts.run.train
    rows = [
        ["steps, tokens", f"{facts.progress.step:,}, {facts.progress.tokens:,}, of {train.tokens_per_step:,} a step"],
        ["row", f"{run.data.seq_len:,} tokens, attention {run.data.attention}"],
        [
            "learning rate",
            f"{train.lr:g} to {train.min_lr:g}, {train.schedule}, {train.warmup_steps:,} steps of warm-up",
        ],
        [
            "AdamW",
            f"betas {train.betas[0]:g} and {train.betas[1]:g}, weight decay {train.weight_decay:g}, clipped at {train.clip:g}",
        ],
        ["loss", ", ".join(f"{name} {weight(value)}" for name, value in run.terms.items()) + loss_settings(facts)],
        ["precision, seed", f"{train.precision}, {run.seed}"],
    ]
    if run.method == "ted":
        rows.insert(
            5,
            [
                "filters",
                f"width {run.filters.width}, start {run.filters.start}, {run.filters.steps:,} steps of stage I",
            ],
        )
    return rows


def loss_settings(facts: Facts) -> str:
    loss = facts.run.loss
    if not facts.teacher:
        return ""
    return f"; {loss.divergence} divergence, temperature {loss.temperature:g}" + (
        f", layers by {loss.kind}" if facts.run.matches_layers else ""
    )


def weight(value) -> str:
    if not isinstance(value, Schedule):
        return f"{value:g}"
    return ", ".join(
        f"{key} {found}" for key, found in value.model_dump(exclude_none=True, exclude_defaults=True).items()
    )


def compute(facts: Facts) -> list[list[str]]:
    spent = facts.progress.spent
    flops = ", ".join(f"{count} in stage {name}" for name, count in facts.flops.items())
    is_part = facts.planned is not None and facts.progress.step < facts.planned
    return [
        ["FLOPs", (flops + (", with all steps of the run" if is_part else "")) or UNKNOWN],
        ["device", safe(facts.device) if facts.device else UNKNOWN],
        ["ranks of the last start", facts.ranks or UNKNOWN],
        ["hours in steps", f"{spent.steps / 3600:.3g}" if spent else UNKNOWN],
        ["exported with", ", ".join(versions()) or UNKNOWN],
        ["commit of the exporting code", commit()],
    ]


def versions() -> list[str]:
    """Of this moment: a run's files do not have those of its training."""
    return [f"{name} {found}" for name in PACKAGES if (found := version_of(name))]


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    from ted_scale.metrics.wandb_connection import git_facts

    return git_facts().get("git_commit", UNKNOWN)


def limits(facts: Facts) -> str:
    said = (
        "Held-out text is of the same corpora, so its loss says little of other text. The run's files name no licence and no "
        "language."
    )
    if not facts.suite:
        return f"{said} No benchmark was asked in training."
    rows = [[safe(name), number(value)] for name, value in facts.suite.items()]
    return f"{said} Benchmarks that training asked, at the last such validation:\n\n{table(['task', 'score'], rows)}"


def number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def safe(text: str) -> str:
    """A line of plain text in Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#!&~$])", r"\\\1", printable(redact(text)))
