"""How long the parts of a step take."""

import contextlib
import time

import torch


class Clock:
    """Sums of named durations. On CUDA it records events, and waits for them only in `read`."""

    def __init__(self, device: torch.device):
        self.cuda, self.spans = device.type == "cuda", []

    @contextlib.contextmanager
    def time(self, name: str):
        start = self.now()
        try:
            yield
        finally:
            self.spans.append((name, start, self.now()))

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Milliseconds by name since the last read."""
        total: dict[str, float] = {}
        for name, start, end in self.spans:
            elapsed = start.elapsed_time(end) if self.cuda else (end - start) * 1e3
            total[name] = total.get(name, 0.0) + elapsed
        self.spans = []
        return total
