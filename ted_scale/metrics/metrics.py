"""Writes a run's numbers to metrics.jsonl, to the console of rank 0, and to Weights & Biases if the run file asks for it.

Once a step, train.py passes numbers that are on the host already. This file averages them over `log_every` steps and adds speed
and memory. Note: on a GPU a duration is a pair of events, which are read only when the row is written.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TextIO

import torch

from ted_scale.base import redact
from ted_scale.base.beneath import append_to
from ted_scale.base.errors import files_at
from ted_scale.checkpoints import life
from ted_scale.checkpoints.life import Lost, Spent
from ted_scale.checkpoints.progress import Progress
from ted_scale.config.run import Run
from ted_scale.distill.flops import Work, keys_of, lengths_of
from ted_scale.metrics import alerts
from ted_scale.metrics.clock import Clock
from ted_scale.metrics.console import log_line
from ted_scale.metrics.goodput import Ledger
from ted_scale.metrics.line import before_and_after, beside
from ted_scale.metrics.live_report import LiveReport
from ted_scale.metrics.peaks import device_peak
from ted_scale.metrics.rows import NAME, rows_at, rows_in, trim_all
from ted_scale.metrics.teller import Teller
from ted_scale.metrics.time_left import Ahead
from ted_scale.metrics.wandb_connection import WandbRun, add_stage
from ted_scale.metrics.wandb_tables import add_page, add_row


class Metrics:
    """Writes a row every `log_every` steps. Only rank 0 writes; on other ranks the same calls do nothing."""

    def __init__(
        self, run: Run, *, writes: bool, total_steps: int, step: int, device, wandb_run: WandbRun | None,
        spent: Spent | None = None,
    ):  # fmt: skip
        self.writes, self.wandb_run, self.device = writes, wandb_run, device
        self.every, self.peak = run.log_every, device_peak(device, run.train.precision)
        self.rows: list[dict[str, float]] = []
        self.works: list[Work] = []  # FLOPs of a token, for each step since the last row
        self.waits: dict[str, float] = {}
        self.stream = None  # the training stream
        self.clock, self.since, self.tokens_before = Clock(device), time.perf_counter(), None
        self.ledger = Ledger(spent or Spent())
        self.restart: dict[str, float] = {}  # cost of the last process's end, until it is written in a row
        self.forecast: dict[str, float] = {}  # of the stage (forecast/summary.py)
        self.rows_of_stage = 0
        self.step, self.told, self.words = step, time.monotonic(), ""
        self.lost = False
        self.report = LiveReport(run.folder, run.report.every_minutes) if writes and run.report.every_minutes else None
        self.file: TextIO | None = None
        self.path, self.already = run.folder / NAME, set()
        self.open(step)
        self.teller = Teller(total_steps, step, writes=writes)

    def open(self, step: int) -> None:
        """Open the file, to append rows after `step`, the run's current step."""
        if self.writes:
            with files_at(self.path):
                self.already = rows_at(self.path, step)
                self.file = append_to(self.path)

    def go_back(self, progress: Progress) -> None:
        """Remove the rows after an earlier step, as a resume from that step does."""
        self.close_file()
        if self.writes:
            with contextlib.suppress(OSError):
                trim_all(self.path.parent, progress.step)
        self.open(progress.step)
        self.step = progress.step
        self.ledger.undo(progress.spent)
        self.resume_from(progress.tokens)

    def add(self, progress: Progress, values: dict[str, float], *, last: bool) -> None:
        """Add a step's numbers; write the row when it is due."""
        self.rows.append(values)
        self.step = progress.step
        self.teller.step(self.step, self.ledger)
        if time.monotonic() - self.told > life.EVERY_S:
            self.write_last_words()
        if progress.step % self.every == 0 or last:
            row = {**mean_rows(self.rows), **self.performance(progress.tokens, len(self.rows))}
            row |= {"optim/skipped": progress.skipped} if progress.skipped else {}
            row |= self.ledger.shares() | self.restart
            self.restart = {}
            self.compare(row)
            self.write(progress.step, progress.tokens, row | self.read_of_corpora(progress.samples))
            self.rows = []

    def expect(self, forecast: Callable[[], Ahead]) -> None:
        """Take the plan's forecast for the stage that begins. Only rank 0 computes it, because only rank 0 writes."""
        self.rows_of_stage = 0
        if self.writes:
            ahead = forecast()
            self.forecast = ahead.forecast
            self.teller.begin(ahead)
            self.call_wandb(partial(add_stage, ahead.name))

    def compare(self, row: dict[str, float]) -> None:
        """Add the forecast to the row. At the second row, log the forecast beside the measurement, because the first row includes
        the start."""
        self.rows_of_stage += 1
        row |= self.forecast
        if self.rows_of_stage == 2 and self.writes and self.forecast:
            log_line(beside(row, self.device.type))

    def read_of_corpora(self, samples: int) -> dict[str, float]:
        """For each corpus, in this stage: the epoch, the tokens read in it, and the tokens read in all."""
        row = {}
        if self.stream is None:
            return row
        interval = self.stream.interval
        for domain, cursor in zip(interval.domains, interval.cursors_at(samples), strict=True):
            values = {"epoch": cursor.epoch, "epoch_tokens": cursor.token, "tokens": cursor.seen}
            row |= {f"data/{domain.name}/{key}": value for key, value in values.items()}
        return row

    def log_changes(self, sentences: list[str]) -> None:
        """Log which parts of the run file and the data have changed at a resume, also in W&B."""
        for sentence in sentences:
            log_line(sentence)
        if sentences:
            self.call_wandb(partial(add_changes, redact.cleaned(sentences)))

    def restarted(self, lost: Lost) -> None:
        """Log the cost of the last process's end. The next row has it, too."""
        log_line(lost.sentence(self.step))
        self.restart = lost.row()
        self.send(alerts.restarted(lost.sentence(self.step)))

    def write_last_words(self, words: str = "") -> None:
        """On rank 0: write for the next start how far this process came, and why it ended."""
        self.told, self.words = time.monotonic(), self.words or (words and life.ending(words))
        if self.writes:
            life.write(self.path.parent, life.Life(self.step, self.ledger.spent(), self.words))
        if words:
            self.send(alerts.broke_off(self.words))

    def alert(self, title: str, text: str) -> None:
        """Log an alert and send it to W&B. W&B drops a second alert within a minute."""
        if self.writes:
            log_line(text, logging.WARNING)
        self.send(alerts.Alert(title, text, "WARN"))

    def send(self, alert: alerts.Alert | None) -> None:
        if alert:
            self.call_wandb(partial(alerts.send, alert))

    def performance(self, tokens: int, steps: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self.since
        spans = {f"perf/{name}": total / steps for name, total in {**self.waits, **self.clock.read()}.items()}
        self.waits = {}
        rate = (tokens - (self.tokens_before or 0)) / elapsed
        self.since, self.tokens_before = time.perf_counter(), tokens
        row = {"perf/tokens_per_s": rate, "perf/step_ms": elapsed / steps * 1e3, **spans}
        row["memory/peak_gib"] = peak_memory(self.device) / 2**30
        return {**row, **self.utilization(rate)}

    def utilization(self, rate: float) -> dict[str, float]:
        """Shares of the devices' peak: of the FLOPs that the steps need, and of all FLOPs with recomputed ones (docs/flops.md)."""
        works, self.works = self.works, []
        if not (self.peak and works):
            return {}
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        model, again = (math.fsum(column) / len(works) for column in zip(*works, strict=True))
        share = rate / (self.peak * world)
        return {"perf/mfu": share * model, "perf/hfu": share * (model + again)}

    def counted(self, steps, work):
        """Yield the numbered `steps`, and add up the `work(number, keys)` of each. This rank's documents are a sample of all
        ranks'."""
        for number, micro_batches in steps:
            if self.peak and self.writes:
                self.works.append(work(number, keys_of(lengths_of(micro_batches))))
            yield micro_batches

    def timed(self, items, name: str):
        """Yield the `items`, and add the time spent waiting for each to the duration `name`."""
        items = iter(items)
        while True:
            start = time.perf_counter()  # the time that the host waits, even if the device is busy
            item = next(items, None)
            self.waits[name] = self.waits.get(name, 0.0) + (time.perf_counter() - start) * 1e3
            if item is None:
                return
            yield item

    def reads(self, stream) -> None:
        """Say that the run trains on `stream` from here on."""
        self.stream = stream

    @contextlib.contextmanager
    def aside(self, part: str = "validation"):
        """The time spent in this context is not part of a step's time."""
        start = time.perf_counter()
        with self.ledger.within(part):
            yield
        self.since += time.perf_counter() - start

    def has_already(self, step: int, prefix: str) -> bool:
        """On rank 0: whether an earlier process wrote numbers of this step with keys that begin with `prefix`."""
        return any(row[0] == step and any(key.startswith(prefix) for key in row[1:]) for row in self.already)

    def resume_from(self, tokens: int) -> None:
        """Measure the speed from here on, without start-up and without the tokens of an earlier process."""
        self.tokens_before, self.since, self.rows, self.works = tokens, time.perf_counter(), [], []
        self.waits = {}
        self.clock.read()
        self.ledger.turn("steps")
        self.teller.anew(self.step)

    def write(self, step: int, tokens: int, values: dict[str, float]) -> None:
        if not self.writes or not values or (step, *values) in self.already:
            return
        row = {"step": step, "tokens": tokens, **values}
        self.append(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}))
        self.call_wandb(partial(add_row, row))
        self.teller.row(step, values, self.ledger)

    def append(self, line: str) -> None:
        """Append a line. On a full disk it is lost. This is logged once and does not stop the run."""
        try:
            self.file.write(line + "\n")
            self.file.flush()
            self.lost = False
        except OSError as error:
            if not self.lost:
                log_line(
                    f"{self.path} must be writable, but is not ({error.strerror}): rows are lost until it is",
                    logging.WARNING,
                )
            self.lost = True

    def close_file(self) -> None:
        """Close the file. A row that did not fit on a full disk is still in the buffer, and then its write fails again."""
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()

    def close(self, *, done: bool = True) -> None:
        self.teller.close()
        self.close_file()
        self.write_last_words()
        if self.report and (page := self.report.close(done=done)):
            self.call_wandb(partial(add_page, page, self.step))
        self.send(alerts.ended(sys.exc_info()[1], self.step) if self.writes else None)
        if self.wandb_run:
            self.wandb_run.close()

    def tell_end(self, words: str) -> None:
        """Log the result of the run, and then the next command. A quiet console shows them, too."""
        if self.writes:
            for line in filter(None, (before_and_after(rows_in(self.path)), words)):
                log_line(line, logging.CRITICAL)

    def call_wandb(self, action) -> None:
        if self.wandb_run:
            self.wandb_run.tell(action)


def add_changes(sentences: list[str], wandb_run) -> None:
    all_changes = [*wandb_run.config.get("changes", []), *sentences]
    wandb_run.config.update({"changes": all_changes}, allow_val_change=True)


def mean_rows(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps since the last row. A term is averaged over the steps in which it was on."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: math.fsum(vs) / len(vs) for key in keys if (vs := [row[key] for row in rows if key in row])}


def peak_memory(device) -> float:
    """Bytes: on a GPU the allocator's peak, elsewhere the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
