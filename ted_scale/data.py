"""The loader: packed windows of the corpora as micro-batches, by position.

order.py says which window stands at a position, corpora.py reads it; this file masks, batches, spreads over ranks and
reads ahead. No array grows with tokens, documents or run length. The surprise: a stream is addressed by position, so
"resume" is nothing but another `start`, and ranks only decide who reads what.
"""

import queue
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy
import torch

from ted_scale import order
from ted_scale.corpora import Part, open_part
from ted_scale.errors import UserError

IGNORED = -100


class Batch(NamedTuple):
    """One micro-batch of one rank; weights are 1 where a label counts, positions exist when documents are masked."""

    tokens_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64, IGNORED where there is none
    weights_BT: torch.Tensor  # float32
    positions_BT: torch.Tensor | None  # int64


class Stream(NamedTuple):
    """Windows of seq_len + 1 tokens by position; `counts` are samples a block of the blend, or windows held out."""

    parts: tuple[Part, ...]
    counts: tuple[int, ...]
    seed: int
    seq_len: int
    mask_documents: bool
    vocab_size: int
    n_samples: int | None  # None: training never ends

    def sample(self, position: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The seq_len + 1 tokens at a position, and which of them start a document."""
        part, offset = self._shuffled(position) if self.n_samples is None else self._in_order(position)
        return part.read(offset, self.seq_len + 1, self.vocab_size)

    def _shuffled(self, position: int) -> tuple[Part, int]:
        which, sample = order.pick(position, self.counts, self.seed)
        part = self.parts[which]
        return part, order.window_start(sample, part.tokens, self.seq_len, order.mix(self.seed, part.number))

    def _in_order(self, position: int) -> tuple[Part, int]:
        ends = list(accumulate(self.counts))
        which = bisect_right(ends, position)
        return self.parts[which], (position - ends[which] + self.counts[which]) * self.seq_len


def open_stream(data, seed: int, vocab_size: int, split: str = "train") -> Stream:
    """Open a run file's data section for "train" (endless, shuffled) or "validation" (finite, in order)."""
    training = split == "train"
    counts = order.shares([corpus.weight for corpus in data.corpora])
    wanted = [bool(counts[i]) if training else c.validation > 0 for i, c in enumerate(data.corpora)]
    if not any(wanted):
        raise UserError("data.corpora.validation must be above 0 for one corpus to validate, but is 0 for all; set one")
    parts = tuple(open_part(i, c, vocab_size, training) for i, c in enumerate(data.corpora) if wanted[i])
    for part in parts:
        _refuse_short(part, data.seq_len, split)
    if training:
        counts, n_samples = tuple(c for c in counts if c), None
    else:
        counts = tuple((part.tokens - 1) // data.seq_len for part in parts)
        n_samples = sum(counts)
    return Stream(parts, counts, seed, data.seq_len, data.mask_documents, vocab_size, n_samples)


def _refuse_short(part: Part, seq_len: int, split: str) -> None:
    if part.tokens <= seq_len:
        raise UserError(
            f"{part.name} must leave data.seq_len + 1 = {seq_len + 1} tokens or more for {split}, but leaves "
            f"{part.tokens}; give more text or change data.seq_len or data.corpora.validation"
        )


def batch(stream: Stream, positions: list[int | None]) -> Batch:
    """The windows at some positions as one batch on the CPU; None is padding, whose labels never count."""
    shape = len(positions), stream.seq_len
    tokens, labels = numpy.zeros(shape, numpy.int64), numpy.full(shape, IGNORED, numpy.int64)
    restart = numpy.tile(numpy.arange(stream.seq_len), (len(positions), 1))
    for row, position in enumerate(positions):
        if position is None:
            continue
        window, starts = stream.sample(position)
        tokens[row], labels[row] = window[:-1], window[1:]
        if stream.mask_documents:
            labels[row, starts[1:]] = IGNORED
            restart[row] -= numpy.maximum.accumulate(numpy.where(starts[:-1], restart[row], 0))
    weights = (labels != IGNORED).astype(numpy.float32)
    arrays = (tokens, labels, weights, restart if stream.mask_documents else None)
    return Batch(*(None if a is None else torch.from_numpy(a) for a in arrays))


def _to(micro: Batch, device: torch.device) -> Batch:
    return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in micro))


def steps(
    stream: Stream,
    *,
    start: int,
    samples_per_step: int,
    micro_batch: int,
    rank: int,
    world: int,
    device,
    prefetch: int = 2,
) -> Iterator[list[Batch]]:
    """Optimizer steps from position `start` on, each the micro-batches of this rank; read ahead by a thread."""
    if samples_per_step % (micro_batch * world):
        raise UserError(
            f"samples per step must be a multiple of train.micro_batch x ranks = {micro_batch * world}, but is "
            f"{samples_per_step}; change train.tokens_per_step or train.micro_batch"
        )
    device, ready, stop = torch.device(device), queue.Queue(prefetch), threading.Event()
    micros = range(samples_per_step // (micro_batch * world))

    def step(position: int) -> list[Batch]:
        firsts = [position + (m * world + rank) * micro_batch for m in micros]
        made = [batch(stream, list(range(first, first + micro_batch))) for first in firsts]
        return [_pinned(micro) for micro in made] if device.type == "cuda" else made

    work = (step, start, samples_per_step, ready, stop, device)
    thread = threading.Thread(target=_produce, args=work, daemon=True, name="ted_scale prefetch")
    thread.start()
    iterator = _consume(ready, stop, device)
    # An iterator that was never started runs no `finally`; and no thread may be inside torch when the interpreter ends.
    weakref.finalize(iterator, _end, stop, thread)
    return iterator


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(timeout=5)


def _pinned(micro: Batch) -> Batch:
    return Batch(*(None if t is None else t.pin_memory() for t in micro))


def _produce(step, position: int, stride: int, ready: queue.Queue, stop: threading.Event, device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is per thread; pinning must not open a context on GPU 0
        while not stop.is_set():
            _put(step(position), ready, stop)
            position += stride
    except BaseException as error:  # whatever it is belongs to the consumer
        _put(error, ready, stop)


def _put(item, ready: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue


def _consume(ready: queue.Queue, stop: threading.Event, device: torch.device) -> Iterator[list[Batch]]:
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield [_to(micro, device) for micro in item]
    finally:
        stop.set()


def validation_batches(
    stream: Stream, *, tokens: int, micro_batch: int, rank: int, world: int, device
) -> Iterator[Batch]:
    """The first `tokens` tokens of a validation stream, each window on one rank; equally many batches on every rank."""
    count = min(stream.n_samples, -(-tokens // stream.seq_len))
    for micro in range(-(-count // (micro_batch * world))):
        first = (micro * world + rank) * micro_batch
        rows = [p if p < count else None for p in range(first, first + micro_batch)]
        yield _to(batch(stream, rows), torch.device(device))
