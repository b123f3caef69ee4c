"""A run's folder as a run leaves it, made up in a moment. The log's lines are those of the functions that log them."""

import json
import math
from pathlib import Path

from ted_scale.checkpoints import life
from ted_scale.checkpoints.life import Lost, Spent
from ted_scale.config import changes
from ted_scale.metrics.line import line_of

TOML = """name = "{name}"
method = "{method}"
seed = {seed}
[student]
path = "student"
[train]
steps = {steps}
lr = {lr}
"""


def made(
    place: Path, *, name="tried", method="ted", steps=40, layers=3, every=1, seed=0, lr=1e-3, shift=0.0, rows=None
) -> Path:
    folder = place / name
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(TOML.format(name=name, method=method, seed=seed, steps=steps, lr=lr))
    lines = [json.dumps(row) for row in rows or rows_of(method, steps, layers, every, shift)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "log.txt").write_text("\n".join(log_lines(folder, steps)) + "\n")
    life.write(folder, life.Life(steps, Spent(at=1.0, steps=60.0, start=5.0), "it was done"))
    return folder


def rows_of(method: str, steps: int, layers: int, every: int, shift: float):
    """Steps that get better, one spike at the middle, and validations at every quarter."""
    for step in range(every, steps + 1, every):
        loss = 3 + shift + 5 * math.exp(-4 * step / steps) + 0.1 * math.sin(step) + 40 * (step == steps // 2)
        row = {"step": step, "tokens": step * 256, "loss/total": loss, "loss/ce": loss / 2}
        if method != "ce":
            row["loss/kl"] = loss / 3
        if method == "ted":
            row |= {f"loss/layer/{layer}": loss / (layer + 2) for layer in range(layers)}
        row |= {"optim/grad_norm": 1.0, "optim/lr": 1e-3, "perf/tokens_per_s": 2560.0, "perf/step_ms": 100.0}
        row |= {"perf/data_wait_ms": 1.0, "perf/teacher_ms": 30.0, "memory/peak_gib": 1.0, "memory/forecast_gib": 0.9}
        row |= {"perf/goodput": 0.9, "perf/lost_start": 0.1, "data/web/epoch": 0, "data/web/tokens": step * 256}
        yield row
        if step % max(every, steps // 4) == 0:
            yield {"step": step, "tokens": step * 256, "checkpoint/write_ms": 20.0, "checkpoint/failed": 0.0}
            yield {
                "step": step,
                "tokens": step * 256,
                "val/loss": loss,
                "val/teacher_loss": 3.0,
                "val/suite/piqa/acc": 0.5,
            }


def log_lines(folder: Path, steps: int) -> list[str]:
    half = steps // 2
    lost = Lost(3, 60.0, 30.0, "it was killed, or its machine is gone").sentence(half)
    changed = changes.changes({}, {}, {"train": {"lr": 1e-3}}, {"train": {"lr": 2e-3}}, half)
    onward = f"back to step_{half:08d} and on with sample 32, rewind 1 of 3"
    row = line_of(half + 1, steps, "", {"loss/total": 4.1, "optim/lr": 1e-3}, validated=None, left="")
    said = [
        f"resuming from {folder}/checkpoints/step_{half:08d}", lost, *changed, row,
        f"step {half + 2}: loss/total is 46, 5.6 times its median over 4 steps; report: x.json; {onward}",
        f"done: {folder} is at step {steps}; next: ted-scale export {folder}",
    ]  # fmt: skip
    return [f"starts at step 0 of {steps}", *(f"10:00:0{second} {line}" for second, line in enumerate(said))]
