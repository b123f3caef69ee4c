"""What the user sees during a run: a line for each row on the console and in log.txt, and a progress bar if the console is a
terminal."""

import logging
import sys

from tqdm import tqdm

from ted_scale.metrics import console
from ted_scale.metrics.goodput import Ledger
from ted_scale.metrics.line import duration, line_of, time_left
from ted_scale.metrics.time_left import Ahead, Left, TimeLeft

BAR = "step {n_fmt} of {total_fmt} |{bar}| {percentage:.0f} %{postfix}"


class Teller:
    """Shows a run of `total` steps that continues from `step`. `writes` is true on rank 0 only."""

    def __init__(self, total: int, step: int, *, writes: bool):
        self.total, self.validated = total, None
        self.left = TimeLeft(Ahead("", 0, total, {}, 0.0, {}))
        sees = writes and sys.stderr.isatty() and console.level <= logging.INFO
        self.bar = tqdm(
            total=total, initial=step, unit="step", disable=not sees, dynamic_ncols=True, bar_format=BAR,
        )  # fmt: skip

    @property
    def stage(self) -> str:
        """The stage's name, if the run has another stage."""
        ahead = self.left.ahead
        return "" if ahead.last - ahead.first == self.total else ahead.name

    def begin(self, ahead: Ahead) -> None:
        self.left = TimeLeft(ahead)

    def anew(self, step: int) -> None:
        """Count and measure steps from here on, as after a start."""
        self.bar.update(step - self.bar.n)
        self.left.began = None

    def step(self, step: int, ledger: Ledger) -> None:
        self.bar.update(1)
        if self.left.began is None:
            self.left.begin(step, ledger.spent())

    def row(self, step: int, values: dict[str, float], ledger: Ledger) -> None:
        left = self.left.row(step, ledger.spent()) if "perf/step_ms" in values else None
        said = time_left(left, self.stage)
        if line := line_of(step, self.total, self.stage, values, validated=self.validated, left=said):
            console.log_line(line)
        if "val/loss" in values:
            self.validated = (step, values["val/loss"])
        if "loss/total" in values:
            self.on_the_bar(values, left)

    def on_the_bar(self, values: dict[str, float], left: Left | None) -> None:
        pace = f"{duration(values['perf/step_ms'] / 1e3)} a step" if "perf/step_ms" in values else ""
        said = [f"loss {values['loss/total']:.4g}", pace, time_left(left, self.stage)]
        self.bar.set_postfix_str(", ".join(filter(None, said)), refresh=False)

    def close(self) -> None:
        self.bar.close()
