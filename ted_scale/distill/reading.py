"""The teacher's signals in a step: how many micro-batches one call of the teacher reads, and when it is called.

A teacher that needs no other rank depends on the data alone. So it reads the next micro-batches while the student's backward
runs. On a GPU it has its own stream: the backward leaves parts of the GPU idle, and the teacher uses them.

Note: the memory of such a call belongs to this stream, and only later calls reuse it. A later call first waits for the work that
the student's stream was given before. So no signal is overwritten while it is read.
"""

from collections import deque
from contextlib import nullcontext

import torch

from ted_scale.distill.signal import Signal, Weights


class Reading:
    """The teacher in one step. Call `signal` once for each micro-batch, and `ahead` before its backward."""

    def __init__(self, teacher, micro_batches: list, each: list[Weights]):
        self.teacher, self.signals = teacher, deque[Signal]()
        self.asked = deque((batch, weights) for batch, weights in zip(micro_batches, each, strict=True) if weights.asks)

    def signal(self, weights: Weights) -> Signal | None:
        """The signal of the next micro-batch, whose weights are `weights`. Only the device waits for it, not the host."""
        if not weights.asks:
            return None
        if not self.signals:
            self.call()
        if self.teacher.stream:
            torch.cuda.current_stream().wait_stream(self.teacher.stream)
        return self.signals.popleft()

    def ahead(self) -> None:
        """Call the teacher for the next micro-batches of this step. Nothing happens if it has read them already, or if it needs
        other ranks."""
        if self.asked and not self.signals and self.teacher.early:
            self.call()

    def call(self) -> None:
        """Call the teacher for the next micro-batches. All micro-batches of a step that ask the teacher have the same weights."""
        together = [self.asked.popleft() for _ in range(min(self.teacher.together, len(self.asked)))]
        stream = self.teacher.stream
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream else nullcontext():
            self.signals.extend(self.teacher.each([batch for batch, _ in together], together[0][1]))
