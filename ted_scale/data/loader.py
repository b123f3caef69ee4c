"""The loader: optimizer steps as micro-batches by position, read ahead by a thread or by worker processes, and on the device
when they are asked for.

stream.py reads a batch at given positions; this file says which positions are this rank's and who reads them when. The
surprise: a thread collects what workers read, in the order that it was asked for, so the stream is the same for any
number of them; why they are not torch's DataLoader stands in docs/design/0015-workers-on-pipes.md.
"""

import atexit
import contextlib
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from ted_scale.base.errors import SENTENCES, Gone, UserError
from ted_scale.data.stream import Batch, Stream, batch, read_ahead
from ted_scale.ranks.signals import SIGNALS

# Not fork: by now there are threads of CUDA and gloo, and a child inherits their locks as they stand. Not spawn: every
# worker would import torch and megatron itself, 9 s and half a GB each.
PROCESSES = multiprocessing.get_context("forkserver")


class Loader:
    """Opened once for a run; `steps` draws from it, one stretch of a stream after another."""

    def __init__(self, *, workers: int, prefetch: int, micro_batch: int, rank: int, world: int, device):
        self.prefetch, self.micro_batch, self.rank, self.world = prefetch, micro_batch, rank, world
        self.device = torch.device(device)
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "ted_scale prefetch", set_device, (self.device,))
        self.hired = self.thread.submit(hire, workers, rank)  # seconds, in which the models are built
        self.turn = 0

    def steps(
        self, stream: Stream, *, start: int, stop: int | None = None, samples_per_step: int
    ) -> Iterator[list[Batch]]:
        """Optimizer steps from position `start` up to `stop`, each the micro-batches of this rank; nothing is read past `stop`,
        and at most `prefetch` steps past the one that is handed out."""
        if samples_per_step % (self.micro_batch * self.world):
            raise UserError(
                f"samples per step must be a multiple of train.micro_batch x ranks = {self.micro_batch * self.world}, but is "
                f"{samples_per_step}; change train.tokens_per_step or train.micro_batch"
            )
        positions = count(start, samples_per_step) if stop is None else range(start, stop, samples_per_step)
        return self._drawn(stream, positions, samples_per_step)

    def _drawn(self, stream: Stream, positions, samples_per_step: int) -> Iterator[list[Batch]]:
        workers, ahead = self.hired.result(), deque()
        for worker in workers:
            worker.send(stream)
        rows = (rows for position in positions for rows in self._rows(position, samples_per_step))
        rows = read_ahead(rows, stream.windows_ahead, self._announcer(workers, stream))
        micros = samples_per_step // (self.micro_batch * self.world)
        while asked := [self._ask(workers, stream, positions) for positions in islice(rows, micros)]:
            ahead.append(self.thread.submit(self._collect, asked))
            if len(ahead) > self.prefetch:
                yield self._hand_out(ahead.popleft())
        while ahead:
            yield self._hand_out(ahead.popleft())

    def _rows(self, position: int, samples_per_step: int) -> Iterator[list[int]]:
        """The positions of each micro-batch that is this rank's: ranks take turns."""
        first, stride = position + self.rank * self.micro_batch, self.world * self.micro_batch
        for micro in range(first, position + samples_per_step, stride):
            yield list(range(micro, micro + self.micro_batch))

    def _announcer(self, workers: tuple, stream: Stream) -> Callable[[list[int]], None]:
        """Who is told of a micro-batch whose chunks are to be fetched: the one that will read it."""
        if not workers:
            return stream.ahead
        turns = count(self.turn)
        return lambda positions: workers[next(turns) % len(workers)].send(Ahead(positions))

    def _ask(self, workers: tuple, stream: Stream, rows: list[int]) -> Callable[[], Batch]:
        """How to get a micro-batch: by reading it, or from the worker that is told of it now; workers take turns. Its answer is
        taken up at once, for a worker that cannot get rid of one reads no further task."""
        if not workers:
            return partial(batch, stream, rows)
        worker = workers[self.turn % len(workers)]
        self.turn += 1
        worker.send(rows)
        return self.thread.submit(worker.answer).result

    def _collect(self, asked: list[Callable[[], Batch]]) -> tuple[list[Batch], torch.cuda.Event | None]:
        """In the thread: a step's micro-batches on the device, or on the way to it."""
        micros = [get() for get in asked]
        if self.copies is None:
            return [micro.moved(lambda t: t.to(self.device)) for micro in micros], None
        with torch.cuda.stream(self.copies):
            moved = [micro.moved(lambda t: t.pin_memory().to(self.device, non_blocking=True)) for micro in micros]
            return moved, self.copies.record_event()

    def _hand_out(self, step: Future) -> list[Batch]:
        micros, copied = step.result()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for micro in micros:
                micro.moved(lambda t: t.record_stream(current))  # its memory is not given back to the copies before
        return micros

    def close(self) -> None:
        """Waits for no read: one may hang, and a run that stops must say so."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        if self.hired.done() and not self.hired.cancelled():
            for worker in self.hired.result():
                worker.process.kill()
                atexit.unregister(worker.process.kill)


class Ahead(NamedTuple):
    """What a worker is told of the windows that it will be asked for later."""

    positions: list[int]


def set_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # it is per thread; pinning must not open a context on GPU 0


class Worker(NamedTuple):
    number: int
    rank: int
    process: multiprocessing.process.BaseProcess
    pipe: Connection

    def send(self, task) -> None:
        try:
            self.pipe.send(task)
        except OSError:
            raise self.gone() from None

    def answer(self) -> Batch:
        try:
            made = self.pipe.recv()
        except (EOFError, OSError):
            raise self.gone() from None
        if isinstance(made, Exception):
            raise made
        return made.moved(torch.from_numpy)

    def gone(self) -> Gone:
        self.process.join(5)
        code = self.process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"left with exit code {code}"
        return Gone(
            f"worker {self.number} of rank {self.rank} (pid {self.process.pid}) must read as long as the run goes, but {how}; the "
            "last checkpoint is intact: look whether the machine ran out of memory, then start the same command again"
        )


def hire(workers: int, rank: int) -> tuple[Worker, ...]:
    PROCESSES.set_forkserver_preload(["ted_scale.data.preloaded"])
    return tuple(start_worker(number, rank) for number in range(workers))


def start_worker(number: int, rank: int) -> Worker:
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=serve, args=(theirs,), name=f"ted_scale worker {number}", daemon=True)
    process.start()
    atexit.register(process.kill)  # before multiprocessing's own, which sends a SIGTERM and waits
    theirs.close()  # the worker's end is the worker's alone, so that its death is an end of file
    return Worker(number, rank, process, ours)


def serve(pipe: Connection) -> None:
    """A worker: micro-batches of the stream that it was sent last, until the trainer closes the pipe or is no more."""
    for number in (signal.SIGINT, *SIGNALS):  # they may go to all; the trainer's end is the worker's
        signal.signal(number, signal.SIG_IGN)
    stream = None
    try:
        while True:
            task = pipe.recv()
            if isinstance(task, Stream):
                stream = task
            elif isinstance(task, Ahead):
                with contextlib.suppress(Exception):  # what stands in the way is told by the read that meets it
                    stream.ahead(task.positions)
            else:
                pipe.send(read(stream, task))
    except (EOFError, OSError):
        return


def read(stream: Stream, rows: list[int]) -> Batch | Exception:
    """Arrays, for tensors would travel through shared memory, which containers are short of, and a descriptor each."""
    try:
        return batch(stream, rows).moved(torch.Tensor.numpy)
    except SENTENCES as error:
        return error
    except Exception:  # as text, because not every exception survives the way
        return RuntimeError(f"a worker of the loader failed:\n{traceback.format_exc()}")
