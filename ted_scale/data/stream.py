"""Packed windows of the corpora as batches, by position.

blend.py says which window is at a position, and corpus.py reads it. This file sets masks, makes batches, and says which positions
belong to a rank. loader.py reads ahead. No array grows with tokens, documents or run length. Note: a stream is addressed by
position, so a resume only starts at another position.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy
import torch

from ted_scale.base.errors import UserError
from ted_scale.corpora.corpus import Part, open_parts
from ted_scale.data import blend, order, packing
from ted_scale.data.blend import Domain, Interval
from ted_scale.data.packing import Packing, Share, pack
from ted_scale.data.packs import Packs, open_packs
from ted_scale.kernels.tokens import IGNORED


class Batch(NamedTuple):
    """One micro-batch of one rank. A weight is 1 if the label is a target. There is a packing if documents are kept apart, and a
    share if several ranks share these rows."""

    tokens_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64, IGNORED where there is none
    weights_BT: torch.Tensor  # float32; 0 also for a label that only the teacher's terms may count (loss.tokens)
    packing: Packing | None
    share: Share | None = None

    def moved(self, move) -> "Batch":
        """This batch with `move` applied to every tensor."""
        tokens, labels, weights = (move(t) for t in self[:3])
        packed, share = self.packing and self.packing.moved(move), self.share and self.share.moved(move)
        return Batch(tokens, labels, weights, packed, share)


def joined(batches: list[Batch]) -> Batch:
    """One batch with the rows of several micro-batches."""
    tokens, labels, weights = (torch.cat(column) for column in list(zip(*batches, strict=True))[:3])
    packed = packing.joined([b.packing for b in batches]) if batches[0].packing else None
    share = packing.joined_shares([b.share for b in batches]) if batches[0].share else None
    return Batch(tokens, labels, weights, packed, share)


def cut(whole: Batch, index: int, of: int) -> Batch:
    """Piece `index` of every row, which is cut into `of` equal pieces. The last label of a piece is the first token of the next
    piece, because labels are made before the cut."""
    if of == 1:
        return whole
    rows, length = whole.tokens_BT.shape
    positions = whole.packing.positions_BT if whole.packing else torch.arange(length).expand(rows, length)
    parts = (t.chunk(of, dim=1)[index].contiguous() for t in (*whole[:3], positions))
    tokens, labels, weights, positions = parts
    return Batch(tokens, labels, weights, whole.packing, Share(index, of, positions))


class Window(NamedTuple):
    """seq_len tokens; the label of each, or IGNORED; whether each label is a target; where documents and pieces begin; where
    documents end."""

    tokens: numpy.ndarray
    labels: numpy.ndarray
    targets: numpy.ndarray
    begins: numpy.ndarray
    ends: numpy.ndarray


class Stream(NamedTuple):
    """Windows by position: either the endless windows of the blend, or the `count` held-out windows of one corpus, in order. A
    stage's corpora are listed once, for training and for held-out text. So a file that is added later cannot move text from one
    to the other."""

    parts: dict[str, Part]
    interval: Interval | None
    count: int | None  # None: training never ends
    seq_len: int
    attention: str
    vocab_size: int
    held_out: dict[str, "Stream"]  # by corpus; a held-out stream has none
    packs: dict[str, Packs]  # by corpus, if rows are packed from whole examples

    def sample(self, position: int) -> Window:
        part, pieces = self._at(position)
        tokens, labels = numpy.zeros(self.seq_len, numpy.int64), numpy.full(self.seq_len, IGNORED, numpy.int64)
        targets, begins, ends, at = numpy.ones(self.seq_len, bool), [], [], 0
        for first, length in pieces:
            count = min(length + 1, part.tokens - first)  # the part's last token has no label
            read, starts = part.read(first, count, self.vocab_size)
            tokens[at : at + length], labels[at : at + count - 1] = read[:length], read[1:]
            if (counts := part.targets(first, count)) is not None:
                targets[at : at + count - 1] = counts[1:]
            begins += [[at], at + starts[starts < length]]
            ends.append(at + starts[starts > 0] - 1)
            at += length
        if self.packs and at < self.seq_len:
            begins.append([at])  # padding is no part of the example before it
        return Window(tokens, labels, targets, numpy.concatenate(begins), numpy.concatenate(ends))

    def begins(self, position: int) -> numpy.ndarray:
        """Where documents and pieces begin in a window, from the indices alone."""
        part, pieces = self._at(position)
        begins, at = numpy.zeros(self.seq_len, bool), 0
        for first, length in pieces:
            begins[at], begins[at + part.begins(first, length)] = True, True
            at += length
        begins[at : at + 1] |= bool(self.packs)
        return begins

    def ahead(self, positions: list[int | None]) -> None:
        """Say that the windows at these positions will be read soon."""
        for position in positions:
            if position is not None:
                part, pieces = self._at(position)
                for first, length in pieces:
                    part.ahead(first, length + 1)

    @property
    def windows_ahead(self) -> int:
        """How many windows to fetch before they are read; 0 for corpora on disk."""
        remote = [p.stream.ahead for p in self.parts.values() if any(shard.files.remote_bin for shard in p.shards)]
        return max(remote, default=0)

    def _at(self, position: int):
        """(part, pieces in it) of a window."""
        if self.interval is None:
            name, pieces = next(iter(self.parts)), [(position * self.seq_len, self.seq_len)]
        else:
            which, cursor = self.interval.at(position)
            name, pieces = self.interval.domains[which].name, list(self.interval.pieces(which, cursor))
        if packs := self.packs.get(name):  # unit k of the epoch is pack k
            pieces = packs.pieces(pieces[0][0] // self.seq_len)
        return self.parts[name], pieces


def open_stream(
    data, seed: int, vocab_size: int, before: Interval | None = None, position: int = 0, weights: dict | None = None
) -> Stream:
    """The endless, shuffled training stream of a run file's data section. Its held-out streams come from the same listing of the
    corpora. If an earlier blend is given, it continues at `position`. If measured `weights` are given, it uses them."""
    order.shares([c.weight for c in data.corpora])  # refuses weights from which no shares follow
    parts, held_out = parts_of(data, vocab_size)
    packs = packs_of(data, parts)
    sources: dict[str, Part | Packs] = {**parts, **packs}
    domains = [Domain(name, source.tokens, source.content) for name, source in sources.items()]
    written = [(weights or {}).get(c.name, c.weight) for c in data.corpora if c.weight > 0]
    kind, sizes = data.blend, [domain.tokens for domain in domains]
    shares = order.shares(blend.weights_of(kind.kind, kind.temperature, written, sizes))
    if before is None:
        interval = blend.begin(domains, shares, data.seq_len, seed)
    else:
        interval = blend.follow(before, position, domains, shares, data.seq_len)
    streams = {name: held_out_stream(data, vocab_size, part, name) for name, part in held_out.items()}
    return Stream(parts, interval, None, data.seq_len, data.attention, vocab_size, streams, packs)


def parts_of(data, vocab_size: int) -> tuple[dict[str, Part], dict[str, Part]]:
    """(the parts to train on, the parts that are held out), by corpus. Each corpus is listed once for both."""
    wanted = [(i, corpus) for i, corpus in enumerate(data.corpora) if corpus.weight or corpus.validation]
    listed = [(corpus, open_parts(i, corpus, vocab_size, data.stream)) for i, corpus in wanted]
    training = {corpus.name: part for corpus, (part, _) in listed if corpus.weight}
    held_out = {corpus.name: part for corpus, (_, part) in listed if corpus.validation}
    for split, parts in (("train", training), ("validation", held_out)) if data.packing == "windows" else ():
        for part in parts.values():
            _refuse_short(part, data.seq_len, split)
    return training, held_out


def held_out_stream(data, vocab_size: int, part: Part, name: str) -> Stream:
    """The validation documents of a corpus: a finite stream, in order."""
    packs = packs_of(data, {name: part})
    windows = packs[name].counts.packs if packs else (part.tokens - 1) // data.seq_len
    return Stream({name: part}, None, windows, data.seq_len, data.attention, vocab_size, {}, packs)


def packs_of(data, parts: dict[str, Part]) -> dict[str, Packs]:
    """The packs of each corpus, if rows are packed from whole examples."""
    if data.packing == "windows":
        return {}
    return {name: open_packs(part, data.seq_len, data.longer) for name, part in parts.items()}


def refuse_repetition(data, stream: Stream, samples: int) -> None:
    """Refuse a corpus that must not repeat if it is too short for all samples of a stage."""
    cursors = dict(zip((d.name for d in stream.interval.domains), stream.interval.cursors_at(samples), strict=True))
    for i, corpus in enumerate(data.corpora):
        cursor = cursors.get(corpus.name)
        if cursor and not corpus.repeat and (cursor.epoch, cursor.token) > (1, 0):
            raise UserError(
                f"data.corpora[{i}].repeat must be true for {samples} samples of {data.seq_len} tokens, but is false, and "
                f"corpus {corpus.name} would be in epoch {cursor.epoch}; give more text, fewer steps or a smaller weight"
            )


def _refuse_short(part: Part, seq_len: int, split: str) -> None:
    if part.tokens <= seq_len:
        raise UserError(
            f"{part.name} must leave data.seq_len + 1 = {seq_len + 1} tokens or more for {split}, but leaves "
            f"{part.tokens}; give more text or change data.seq_len or data.corpora.validation"
        )


def batch(stream: Stream, positions: list[int | None]) -> Batch:
    """The windows at `positions` as one batch on the CPU. A position of None is a padding row, whose labels never count."""
    shape = len(positions), stream.seq_len
    tokens, labels = numpy.zeros(shape, numpy.int64), numpy.full(shape, IGNORED, numpy.int64)
    begins, targets = numpy.zeros(shape, bool), numpy.ones(shape, bool)
    for row, position in enumerate(positions):
        if position is None:
            continue
        window = stream.sample(position)
        tokens[row], labels[row], targets[row] = window.tokens, window.labels, window.targets
        labels[row, window.ends] = IGNORED  # a document must not predict how the next one begins
        begins[row, window.begins] = True
    weights = ((labels != IGNORED) & targets).astype(numpy.float32)
    tokens, labels, weights = (torch.from_numpy(a) for a in (tokens, labels, weights))
    return Batch(tokens, labels, weights, pack(begins) if stream.attention == "document" else None)


def text_lengths(stream: Stream, windows: int = 64) -> tuple[int, ...]:
    """Lengths of the documents in the first windows of a training stream whose documents are kept apart."""
    return pack(numpy.stack([stream.begins(position) for position in range(windows)])).lengths


def read_ahead(batches: Iterable[list], depth: int, announce: Callable[[list], None]) -> Iterator[list]:
    """Yield the same batches of positions. Before a batch is yielded, the `depth` windows after it are announced."""
    coming, windows = deque(), 0
    for positions in batches:
        if depth:
            announce(positions)
        coming.append(positions)
        windows += len(positions)
        while windows > depth:
            windows -= len(coming[0])
            yield coming.popleft()
    yield from coming


def rank_positions(start: int, stop: int, micro_batch: int, rank: int, world: int) -> Iterator[list[int]]:
    """The positions of each micro-batch of one rank, from `start` to `stop`. Ranks get micro-batches in turn. Ranks that share
    rows count as one."""
    for first in range(start + rank * micro_batch, stop, world * micro_batch):
        yield list(range(first, first + micro_batch))


def validation_batches(
    stream: Stream, *, tokens: int, micro_batch: int, rank: int, world: int, sequence_parallel: int = 1, device
) -> Iterator[Batch]:
    """The first `tokens` tokens of a validation stream. Each token is read by one rank. Every rank gets the same number of
    batches."""
    windows = min(stream.count, -(-tokens // stream.seq_len))
    (reader, index), readers = divmod(rank, sequence_parallel), world // sequence_parallel
    padded = -(-windows // (micro_batch * readers)) * micro_batch * readers
    rows = rank_positions(0, padded, micro_batch, reader, readers)
    batches = ([p if p < windows else None for p in row] for row in rows)
    for positions in read_ahead(batches, stream.windows_ahead, stream.ahead):
        yield cut(batch(stream, positions), index, sequence_parallel).moved(lambda t: t.to(device))
