"""W&B alerts about a run as a whole: it stalls, it was restarted, it ended. health/ sends the alerts about its numbers.

Note: an alert is an action of wandb_connection.py's thread, like a row. A killed run sends no alert, but its next start does.
"""

from typing import NamedTuple

from ted_scale.base import redact
from ted_scale.base.errors import Preempted, shortened
from ted_scale.ranks import signals
from ted_scale.ranks.pulse import Pulse

SHARE = 0.5  # of the time limit, so that the user can still look at the run before the limit ends it
LONGEST = 1000  # characters
STOPPED = "the run stopped"


class Alert(NamedTuple):
    title: str
    text: str
    level: str


def restarted(text: str) -> Alert:
    return Alert("the run was restarted", text, "WARN")


def ended(error: BaseException | None, step: int) -> Alert | None:
    """The alert at a run's end. None after a signal, because the run shall go on, and its next start sends an alert."""
    if error is None:
        return Alert("the run is finished", f"it is at step {step}", "INFO")
    if isinstance(error, Preempted):
        return None
    over = getattr(error, "over", "")
    title = f"{STOPPED}: {over}" if over else STOPPED
    return Alert(title, shortened(f"step {step}: {str(error) or type(error).__name__}", LONGEST), "ERROR")


def broke_off(words: str) -> Alert | None:
    """The alert after a hang or the death of another rank. The process is about to exit, so the alert may come too late."""
    return None if signals.asked.is_set() else Alert(STOPPED, words, "ERROR")


def stalled(now: Pulse, at: float, step_s: float) -> Alert | None:
    """The alert about a step, a validation or a save that has taken half of its limit. A start may read for hours and has lines
    of its own."""
    took = at - now.since
    if now.first or took < SHARE * step_s:
        return None
    text = f"{now.what} has taken {took / 60:.1f} min; limits.step_s ends the run after {step_s / 60:.1f}"
    return Alert("the run stalls", text, "WARN")


def send(alert: Alert, wandb_run) -> None:
    wandb_run.alert(alert.title, redact.redact(alert.text), level=alert.level)
