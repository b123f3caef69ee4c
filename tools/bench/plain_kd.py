"""kd as people write it with torch alone, as an arm of tools/compare.py: row 0 of docs/speedrun.md.

It takes the words of launch/pretrain.py and leaves what tools/compare.py reads of a run: metrics.jsonl and life.json in the run's
folder. Data, learning rates and the judge are the run's, so that the step alone differs. It saves nothing and begins anew.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ted_scale.base.errors import RunStopped, UserError, shown
from ted_scale.base.exits import run_main
from ted_scale.checkpoints import life
from ted_scale.config.run_file import load_run, to_toml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="the run file, TOML")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run = load_run(arguments.config, arguments.set)
    refuse(run)

    from ted_scale.plan import make_plan

    train(make_plan(run, world=1))


def refuse(run) -> None:
    """What this step does not do must not look like an arm that did it."""
    only = {
        "method": (run.method, "kd"),
        "loss.ce": (run.loss.ce, 1.0),
        "loss.kl": (run.loss.kl, 1.0),
        "loss.temperature": (run.loss.temperature, 1.0),
        "loss.divergence": (run.loss.divergence, "forward"),
        "loss.top_k": (run.loss.top_k, 0),
        "loss.skip_low_entropy": (run.loss.skip_low_entropy, 0.0),
        "teacher.every": (run.asks_every, 1),
        "data.attention": (run.data.attention, "causal"),
        "WORLD_SIZE": (os.environ.get("WORLD_SIZE", "1"), "1"),
    }
    for name, (value, known) in only.items():
        if value != known:
            raise UserError(f"{name} must be {known} for plain torch, but is {shown(value)}; change it for this arm")
    if (run.folder / "checkpoints").exists():
        raise UserError(f"{run.folder} must be no folder of a trained run, but has checkpoints; give it another name")


def train(plan) -> None:
    from ted_scale.ranks.group import start_ranks
    from tools.bench.plain_step import PlainTorch
    from tools.bench.step import batches
    from tools.bench.step_parts import Stopwatch

    run, stage, device = plan.run, plan.stages[-1], start_ranks()
    plain, said = PlainTorch(run, run.teacher.path, run.student.path, device), Said(run)
    data = batches(run, device)
    said.loss(0, held_out_loss(plan, plain, device))
    for step in range(1, stage.steps + 1):
        rate = run.train.lr * stage.rate(step - 1)
        for group in plain.optimizer.param_groups:
            group["lr"] = rate
        micro_batches = next(data)
        began = time.perf_counter()
        loss = plain.step(micro_batches, Stopwatch(device, detailed=False))
        said.step(step, loss, rate, time.perf_counter() - began)
        if not math.isfinite(loss):
            raise said.diverged(step)
        if stage.validates(step):
            said.loss(step, held_out_loss(plan, plain, device))
    said.done(stage.steps)


def held_out_loss(plan, plain, device) -> float:
    import torch

    from ted_scale.data.stream import open_stream
    from ted_scale.validate import as_row, measure
    from tools.bench.plain_step import summed_ce

    streams = open_stream(plan.run.data, plan.run.seed, plan.vocabulary).held_out
    plain.student.eval()
    with torch.no_grad(), plain.precision():
        losses = measure(plan, streams, lambda batch: summed_ce(plain.student, batch), device)
    plain.student.train()
    return as_row("", losses)["val/loss"]


class Said:
    """What a comparison reads: rows of metrics, and the seconds that went to steps and to validation."""

    def __init__(self, run):
        self.run, self.steps, self.validation, self.mark = run, 0.0, 0.0, time.perf_counter()
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "run.toml").write_text(to_toml(run))
        (run.folder / "metrics.jsonl").write_text("")

    def step(self, step: int, loss: float, rate: float, seconds: float) -> None:
        self.steps += seconds
        self.mark = time.perf_counter()
        if step % self.run.log_every == 0:
            self._row(step, {"loss/total": loss, "lr": rate, "perf/step_ms": 1e3 * seconds})
            print(f"step {step:6}  total {loss:.4g}  lr {rate:.4g}  step_ms {1e3 * seconds:.0f}", flush=True)

    def loss(self, step: int, loss: float) -> None:
        self.validation += time.perf_counter() - self.mark
        self._row(step, {"val/loss": loss})
        print(f"step {step:6}  val/loss {loss:.4f}", flush=True)

    def done(self, step: int) -> None:
        life.write(self.run.folder, life.Life(step, self._spent(), life.DONE))

    def diverged(self, step: int) -> RunStopped:
        words = f"loss/total must be finite, but is not in step {step}; lower train.lr"
        life.write(self.run.folder, life.Life(step, self._spent(), words))
        return RunStopped(words)

    def _spent(self) -> life.Spent:
        return life.Spent(at=time.time(), steps=self.steps, validation=self.validation)

    def _row(self, step: int, values: dict) -> None:
        row = {"step": step, "tokens": step * self.run.train.tokens_per_step, **values}
        with (self.run.folder / "metrics.jsonl").open("a") as file:
            file.write(f"{json.dumps(row)}\n")
        life.write(self.run.folder, life.Life(step, self._spent()))


if __name__ == "__main__":
    run_main(main)
