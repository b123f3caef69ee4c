"""The teacher's signals in a step: how many micro-batches a call of it reads, and when it is called.

A teacher that needs no other rank depends on the data alone. So it reads what comes next while the student's backward runs,
on a stream of its own where there is one: what the GPU does not need for one of them is left for the other.

Note: all memory of such a call belongs to that stream, and is used again by later calls alone. Each of them waits for what
the student was given before it, so no signal is overwritten while it is read.
"""

from collections import deque
from contextlib import nullcontext

import torch

from ted_scale.distill.signal import Signal, Weights


class Reading:
    """Of one step: `signal` once for each micro-batch, `ahead` before its backward."""

    def __init__(self, teacher, micro_batches: list, each: list[Weights]):
        self.teacher, self.signals = teacher, deque[Signal]()
        self.asked = deque((batch, weights) for batch, weights in zip(micro_batches, each, strict=True) if weights.asks)

    def signal(self, weights: Weights) -> Signal | None:
        """The next micro-batch's, whose weights these are. Only the device waits for it."""
        if not weights.asks:
            return None
        if not self.signals:
            self.call()
        if self.teacher.stream:
            torch.cuda.current_stream().wait_stream(self.teacher.stream)
        return self.signals.popleft()

    def ahead(self) -> None:
        """Calls the teacher for what comes next in this step, unless that has been read, or other ranks would have to call it,
        too."""
        if self.asked and not self.signals and self.teacher.early:
            self.call()

    def call(self) -> None:
        """Of the micro-batches of a step, all that ask the teacher have the same weights."""
        together = [self.asked.popleft() for _ in range(min(self.teacher.together, len(self.asked)))]
        stream = self.teacher.stream
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream else nullcontext():
            self.signals.extend(self.teacher.each([batch for batch, _ in together], together[0][1]))
