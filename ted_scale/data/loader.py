"""The loader: one thread reads the micro-batches of optimizer steps ahead and copies them to the device.

stream.py reads a batch at given positions and says which positions belong to this rank. This file decides when they are read. A
thread reads, not other processes, because copying a batch through a pipe costs more than reading it. The numbers are in
docs/design/0015-workers-on-pipes.md.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice

import torch
import torch.distributed as dist

from ted_scale.base.errors import UserError
from ted_scale.data.stream import Batch, Stream, batch, cut, rank_positions, read_ahead, validation_batches


class Loader:
    """Opened once for a run. `steps` reads one stretch of a stream after another. With `sequence_parallel` = n, n neighbouring
    ranks read the same windows, and each keeps its piece of them."""

    def __init__(
        self, *, prefetch: int, micro_batch: int, rank: int, world: int, sequence_parallel: int = 1, device
    ):  # fmt: skip
        self.prefetch, self.micro_batch = prefetch, micro_batch
        self.rank, self.world = rank // sequence_parallel, world // sequence_parallel
        self.piece = rank % sequence_parallel, sequence_parallel
        self.device = torch.device(device)
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "ted_scale prefetch", set_device, (self.device,))

    def steps(
        self, stream: Stream, *, start: int, stop: int | None = None, samples_per_step: int
    ) -> Iterator[list[Batch]]:
        """Optimizer steps from position `start` to `stop`. Each is a list of this rank's micro-batches. Nothing after `stop` is
        read. At most `prefetch` steps are read ahead."""
        if samples_per_step % (self.micro_batch * self.world):
            raise UserError(
                f"samples per step must be a multiple of train.micro_batch x ranks = {self.micro_batch * self.world}, but is "
                f"{samples_per_step}; change train.tokens_per_step or train.micro_batch"
            )
        positions = count(start, samples_per_step) if stop is None else range(start, stop, samples_per_step)
        return self._drawn(stream, positions, samples_per_step)

    def _drawn(self, stream: Stream, positions, samples_per_step: int) -> Iterator[list[Batch]]:
        place = self.micro_batch, self.rank, self.world
        rows = (row for first in positions for row in rank_positions(first, first + samples_per_step, *place))
        rows = read_ahead(rows, stream.windows_ahead, stream.ahead)
        micros, ahead = samples_per_step // (self.micro_batch * self.world), deque()
        while step := list(islice(rows, micros)):
            ahead.append(self.thread.submit(self._read, stream, step))
            if len(ahead) > self.prefetch:
                yield self._hand_out(ahead.popleft())
        while ahead:
            yield self._hand_out(ahead.popleft())

    def _read(self, stream: Stream, rows: list[list[int]]) -> tuple[list[Batch], torch.cuda.Event | None]:
        """Runs in the thread. A step's micro-batches, on the device or being copied to it."""
        micros = [cut(batch(stream, positions), *self.piece) for positions in rows]
        if self.copies is None:  # on a CPU nothing is copied
            return micros, None
        with torch.cuda.stream(self.copies):
            moved = [micro.moved(lambda t: t.pin_memory().to(self.device, non_blocking=True)) for micro in micros]
            return moved, self.copies.record_event()

    def _hand_out(self, step: Future) -> list[Batch]:
        micros, copied = step.result()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for micro in micros:
                micro.moved(lambda t: t.record_stream(current))  # a later copy must not reuse its memory too early
        return micros

    def close(self) -> None:
        """Stop the thread. This does not wait for a read, which may hang: a run that stops must report why."""
        self.thread.shutdown(wait=False, cancel_futures=True)


def set_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own; pinning must not open a context on GPU 0


def first_batches(run, stream: Stream, tokens: int, device) -> Iterator[Batch]:
    """A stage's first windows, for measurements before its first step. They are the same on any number of ranks."""
    stream = stream._replace(count=-(-tokens // stream.seq_len))
    return validation_batches(
        stream, tokens=tokens, micro_batch=run.train.micro_batch, rank=dist.get_rank(), world=dist.get_world_size(),
        sequence_parallel=run.data.sequence_parallel, device=device,
    )  # fmt: skip
