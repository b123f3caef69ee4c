"""Copies of published checkpoints to object storage, beside training and beside the next save: one at a time, in a thread of
its own on every rank.

What a copy is: copies.py. The surprise: a checkpoint that is published while an earlier one is still on its way has
no copy; the next one has.
"""

import contextlib
import threading
from pathlib import Path

import torch.distributed as dist

from ted_scale.base.sealed import MANIFEST
from ted_scale.checkpoints import copies
from ted_scale.checkpoints.attempts import Failure, attempt, first_failure, warn_of_old_ones
from ted_scale.ranks import pulse
from ted_scale.ranks.agree import gather, new_group


class Copier:
    """`alert(title, text)` tells the user."""

    def __init__(self, run, alert):
        self.place, self.settings, self.alert = copies.place_of(run), run.checkpoint, alert
        self.group, self.thread, self.name, self.failed, self.manifests = new_group(), None, "", 0, {}

    def is_at_work(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def begin(self, checkpoint: Path, names: list[str]) -> None:
        """Every rank its own files."""
        self.name = checkpoint.name
        self.thread = threading.Thread(target=self.copy_quietly, args=(checkpoint, names), daemon=True, name="copy")
        self.thread.start()

    def finish(self) -> None:
        """A copy has limits of its own: those of its requests, and another rank's death ends all."""
        while self.is_at_work():
            pulse.beat(f"the copy of {self.name}")
            self.thread.join(1)

    def copy_quietly(self, checkpoint: Path, names: list[str]) -> None:
        with contextlib.suppress(Exception):
            if failure := self.copy(checkpoint, names):
                self.say(checkpoint, failure)
            elif dist.get_rank() == 0:
                failure, _ = attempt(copies.prune, self.place, self.manifests, self.settings)
                warn_of_old_ones(self.place, failure)

    def copy(self, checkpoint: Path, names: list[str]) -> Failure | None:
        """The manifest last; what kept it from there."""
        failure, _ = attempt(copies.send, checkpoint, self.place, names)
        _, failure = first_failure(gather(failure, self.group))
        if not failure and dist.get_rank() == 0:
            failure, _ = attempt(copies.send, checkpoint, self.place, [MANIFEST])
        return failure

    def say(self, checkpoint: Path, failure: Failure) -> None:
        self.failed += 1
        if dist.get_rank() == 0:
            self.alert("a checkpoint was not copied", f"{checkpoint.name} has no copy; the run goes on: {failure.said}")
