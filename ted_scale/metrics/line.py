"""A row of metrics.jsonl as one readable line. docs/reading_a_run.md explains its parts.

Note: a report finds the step of a line by the line's first words (report/events.py).
"""

from collections.abc import Iterable

from ted_scale.metrics.time_left import Left


def line_of(
    step: int, total: int, stage: str, values: dict[str, float], *, validated: tuple[int, float] | None, left: str
) -> str | None:
    """The line, or None if the row has nothing to show. `validated` is the step and the loss of the last validation before."""
    parts = [losses(values), validation(values), *others(values), *optimizer(values), *speed(values)]
    if "loss/total" in values and validated:
        parts.insert(1, f"val {validated[1]:.4g} at {validated[0]:,}")
    if not any(parts):
        return None
    where = f"step {step} of {total:,}" + (f" ({stage})" if stage else "")
    return "  ".join(part for part in (where, *parts, left) if part)


def losses(values: dict[str, float]) -> str:
    if "loss/total" not in values:
        return ""
    terms = [f"{key[5:]} {value:.4g}" for key, value in values.items() if key.startswith("loss/") and shown(key)]
    return f"loss {values['loss/total']:.4g}" + (f" ({', '.join(terms[1:])})" if terms[1:] else "")


def validation(values: dict[str, float]) -> str:
    if "val/loss" not in values:
        return ""
    teacher = f", the teacher's {values['val/teacher_loss']:.4g}" if "val/teacher_loss" in values else ""
    perplexity = f", perplexity {values['val/ppl']:.4g}" if "val/ppl" in values else ""
    return f"validation {values['val/loss']:.4g}{perplexity}{teacher}"


def others(values: dict[str, float]) -> list[str]:
    """The parts for scores of the suite and for weights of an adaptive blend."""
    return [f"{key.split('/', 1)[1]} {value:.4g}" for key, value in values.items() if key.count("/") > 1 and shown(key)]


def optimizer(values: dict[str, float]) -> list[str]:
    said = {"optim/grad_norm": "gradient {:.3g}", "optim/lr": "lr {:.3g}", "optim/skipped": "{:.0f} updates dropped"}
    return [words.format(values[key]) for key, words in said.items() if key in values]


def speed(values: dict[str, float]) -> list[str]:
    if "perf/step_ms" not in values:
        return []
    mfu = [f"MFU {values['perf/mfu']:.0%}"] if "perf/mfu" in values else []
    step = f"{values['perf/tokens_per_s']:,.0f} tokens/s, {duration(values['perf/step_ms'] / 1e3)} a step"
    return [step, *mfu, f"{values['memory/peak_gib']:.3g} GiB"]


def shown(key: str) -> bool:
    """Whether a line shows this loss or score. It shows none of single pairs, and of single corpora only their weights in a
    blend."""
    if key.startswith("blend/"):
        return key.endswith("/weight")
    return key.startswith("val/suite/") or (key.startswith(("loss/", "val/")) and key.count("/") == 1)


def time_left(left: Left | None, stage: str) -> str:
    """The time left, as words. `stage` is the stage's name, if the run has other stages."""
    if left is None or round(left.stage) == 0:
        return ""
    about = "~" if left.is_guess else ""
    if not stage or left.run == left.stage:
        return f"{about}{duration(round(left.stage))} left"
    run = f", ~{duration(round(left.run))} of the run" if left.run else ""
    return f"{about}{duration(round(left.stage))} left of {stage}{run}"


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    for unit, name, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        whole, rest = divmod(round(seconds / small), unit // small)
        if whole:
            return f"{whole} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.0f} s"


def beside(row: dict[str, float], device: str) -> str:
    """A forecast beside its measurement, for the log."""
    whole = ", with the process and what its allocator keeps" if device == "cpu" else ""
    said = [f"memory {row['memory/forecast_gib']:.3g} GiB, {row['memory/peak_gib']:.3g} measured{whole}"]
    if "perf/forecast_ms" in row:
        took, expected = row["perf/step_ms"], row["perf/forecast_ms"]
        said.append(f"a step {duration(expected / 1e3)}, {duration(took / 1e3)} measured ({took / expected:.2f} times)")
    return f"forecast beside measured: {'; '.join(said)}"


def before_and_after(rows: Iterable[dict]) -> str | None:
    """The student's held-out loss before and after stage II, and the teacher's. None if no text is held out."""
    found = [row for row in rows if row.get("val/loss") is not None]
    if not found:
        return None
    teacher = next((row["val/teacher_loss"] for row in found if row.get("val/teacher_loss") is not None), None)
    said = f"held-out loss {found[0]['val/loss']:.4g} before, {found[-1]['val/loss']:.4g} after"
    return said if teacher is None else f"{said}, the teacher's {teacher:.4g}"
