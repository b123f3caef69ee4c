"""Weights & Biases' alerts on how a run goes as a whole: it stalls, it was restarted, it ended. Those on its numbers are health/'s.

Note: an alert is an action of wandb_connection.py's thread, as a row is. A run that is killed sends none; its next start does.
"""

from typing import NamedTuple

from ted_scale.base import redact
from ted_scale.base.errors import Preempted, shortened
from ted_scale.ranks import signals
from ted_scale.ranks.pulse import Pulse

SHARE = 0.5  # of the time limit: whoever gets the alert can still look at the run before the limit ends it
LONGEST = 1000  # characters
STOPPED = "the run stopped"


class Alert(NamedTuple):
    title: str
    text: str
    level: str


def restarted(text: str) -> Alert:
    return Alert("the run was restarted", text, "WARN")


def ended(error: BaseException | None, step: int) -> Alert | None:
    """None after a signal: the run is to go on, and its next start says so."""
    if error is None:
        return Alert("the run is finished", f"it is at step {step}", "INFO")
    if isinstance(error, Preempted):
        return None
    over = getattr(error, "over", "")
    title = f"{STOPPED}: {over}" if over else STOPPED
    return Alert(title, shortened(f"step {step}: {str(error) or type(error).__name__}", LONGEST), "ERROR")


def broke_off(words: str) -> Alert | None:
    """A hang, or the death of another rank: the process is about to exit, so that this one may come too late."""
    return None if signals.asked.is_set() else Alert(STOPPED, words, "ERROR")


def stalled(now: Pulse, at: float, step_s: float) -> Alert | None:
    """A step, a validation or a save that has taken half of its limit. A start may read for hours and has its own lines."""
    took = at - now.since
    if now.first or took < SHARE * step_s:
        return None
    text = f"{now.what} has taken {took / 60:.1f} min; limits.step_s ends the run after {step_s / 60:.1f}"
    return Alert("the run stalls", text, "WARN")


def send(alert: Alert, wandb_run) -> None:
    wandb_run.alert(alert.title, redact.redact(alert.text), level=alert.level)
