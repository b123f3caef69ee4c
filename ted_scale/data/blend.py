"""The position of a run in each corpus of its blend, and how it continues when the blend or seq_len changes.

An interval is a stretch of samples with one set of shares and one seq_len. Its cursors are the positions in the corpora at its
start. All later positions follow from them, so a checkpoint keeps one interval and nothing else of the data. Note: an epoch of a
corpus is cut into units of the seq_len at its beginning. After a change of seq_len, windows are made from these units until the
epoch ends. So every token of the epoch is read exactly once.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ted_scale.config.types import Count, PositiveInt
from ted_scale.data import order


class Cursor(NamedTuple):
    """A place in a corpus: `token` tokens of this epoch and `seen` tokens in all have been read. The epoch is cut into units of
    `unit` tokens."""

    epoch: int
    unit: int
    token: int
    seen: int


class Domain(NamedTuple):
    """What an interval needs to know of a corpus. `content` is a digest of its shards and their order."""

    name: str
    tokens: int
    content: str = ""


class Interval(NamedTuple):
    start: int  # first sample
    seq_len: int
    shares: tuple[int, ...]  # for each domain, its samples in a block of order.BLOCK
    domains: tuple[Domain, ...]
    cursors: tuple[Cursor, ...]  # at the start, one for each domain
    seed: int

    @property
    def key(self) -> int:
        return order.mix(self.seed, self.start) if self.start else self.seed

    def at(self, position: int) -> tuple[int, Cursor]:
        """(the domain of a sample, the cursor there)."""
        which, index = order.pick(position - self.start, self.shares, self.key)
        return which, self.ahead(which, index)

    def cursors_at(self, position: int) -> tuple[Cursor, ...]:
        """The cursor of every domain before the sample at `position`."""
        counts = order.taken(position - self.start, self.shares, self.key)
        return tuple(self.ahead(which, count) for which, count in enumerate(counts))

    def ahead(self, which: int, samples: int) -> Cursor:
        """A domain's cursor after some of its samples. The last window of an epoch cut for another seq_len may be short."""
        if not samples:  # a corpus that was removed may be smaller than a window
            return self.cursors[which]
        cursor, tokens = self.cursors[which], self.domains[which].tokens
        left = units(tokens, cursor.unit) * cursor.unit - cursor.token
        here = -(-left // self.seq_len)
        if samples < here:
            read = samples * self.seq_len
            return cursor._replace(token=cursor.token + read, seen=cursor.seen + read)
        epochs, index = divmod(samples - here, units(tokens, self.seq_len))
        seen = cursor.seen + left + (samples - here) * self.seq_len
        return Cursor(cursor.epoch + 1 + epochs, self.seq_len, index * self.seq_len, seen)

    def pieces(self, which: int, cursor: Cursor) -> Iterator[tuple[int, int]]:
        """(first token, tokens) of each piece of the window at a cursor. A window is one piece, or several from different units."""
        domain = self.domains[which]
        cut = cut_of(domain.tokens, cursor.unit, order.name_key(self.seed, domain.name), cursor.epoch)
        token, end = cursor.token, min(cursor.token + self.seq_len, cut.tokens)
        while token < end:
            index, inside = divmod(token, cut.unit)
            length = min(cut.unit - inside, end - token)
            yield cut.start(index) + inside, length
            token += length


class Cut(NamedTuple):
    """An epoch of a corpus: `count` units of `unit` tokens from `offset` on, in shuffled order."""

    unit: int
    count: int
    offset: int
    key: int

    @property
    def tokens(self) -> int:
        return self.unit * self.count

    def start(self, index: int) -> int:
        """The first token of the unit at `index` of the epoch."""
        return self.offset + order.permute(index, self.count, self.key) * self.unit


def units(tokens: int, unit: int) -> int:
    """The number of units of an epoch that fit at any offset, each with the token after it as a label; 0 if none fits."""
    if tokens <= unit:
        return 0
    return max(1, (tokens - unit) // unit)


@lru_cache(maxsize=1024)
def cut_of(tokens: int, unit: int, key: int, epoch: int) -> Cut:
    """The cut of an epoch. It is shifted by an offset of 0 to unit - 1, or less if the corpus has too few tokens."""
    count, key = units(tokens, unit), order.mix(key, epoch)
    return Cut(unit, count, order.mix(key, -1) % min(unit, tokens - count * unit), key)


def begin(domains: list[Domain], shares: tuple[int, ...], seq_len: int, seed: int) -> Interval:
    fresh = tuple(Cursor(0, seq_len, 0, 0) for _ in domains)
    return Interval(0, seq_len, shares, tuple(domains), fresh, seed)


def follow(
    before: Interval, position: int, domains: Sequence[Domain], shares: tuple[int, ...], seq_len: int
) -> Interval:
    """The same interval if nothing changed, else a new one from `position` on. The cursor of a removed corpus is kept."""
    kept = {d.name: (d, c) for d, c in zip(before.domains, before.cursors_at(position), strict=True)}
    here = {domain.name for domain in domains}
    gone = [domain for domain, _ in kept.values() if domain.name not in here]
    domains, shares = (*domains, *gone), (*shares, *[0] * len(gone))
    if seq_len == before.seq_len and shares_by_domain(domains, shares) == shares_by_domain(
        before.domains, before.shares
    ):
        return before
    cursors = tuple(resumed(domain, *kept.get(domain.name, (domain, None)), seq_len) for domain in domains)
    return Interval(position, seq_len, shares, tuple(domains), cursors, before.seed)


def shares_by_domain(domains, shares) -> dict[Domain, int]:
    return dict(zip(domains, shares, strict=True))


def resumed(domain: Domain, before: Domain, cursor: Cursor | None, seq_len: int) -> Cursor:
    """Where a corpus continues after a resume: in its epoch, with the same unit. If it changed, at the start of the next epoch."""
    if cursor is None:
        return Cursor(0, seq_len, 0, 0)
    if cursor.token and domain == before:
        return cursor
    return Cursor(cursor.epoch + bool(cursor.token), seq_len, 0, cursor.seen)


def changes(before: Interval, after: Interval) -> list[str]:
    """What a run logs when corpora or shares change: a sentence for each change."""
    if after is before:
        return []
    said = []
    old = {
        d.name: (d, n, c) for d, n, c in zip(before.domains, before.shares, before.cursors_at(after.start), strict=True)
    }
    for domain, share in zip(after.domains, after.shares, strict=True):
        was, share_before, cursor = old.get(domain.name, (domain, 0, None))
        if share != share_before:
            said.append(f"corpus {domain.name} gives {share} of {order.BLOCK} samples instead of {share_before}")
        if domain != was:
            left = f": its epoch {cursor.epoch} is left after {cursor.token} tokens and the next one begins"
            said.append(other_text(was, domain) + (left if cursor and cursor.token else ""))
    return [f"from sample {after.start} on {sentence}" for sentence in said]


def other_text(was: Domain, domain: Domain) -> str:
    """How a corpus's text changed: its shards changed, or another part of them is held out."""
    return f"corpus {domain.name} holds other text to train on, {domain.tokens} tokens instead of {was.tokens}"


def other_texts(earlier: Interval | None, after: Interval) -> list[str]:
    """What a run logs about corpora that changed since the stage before."""
    old = {domain.name: domain for domain in earlier.domains} if earlier else {}
    known = ((old[domain.name], domain) for domain in after.domains if domain.name in old)
    return [f"from this stage on {other_text(was, domain)}" for was, domain in known if was != domain]


@with_config(ConfigDict(strict=True, extra="ignore"))
class DomainRecord(TypedDict):
    tokens: PositiveInt
    content: str
    share: Count
    epoch: Count
    unit: PositiveInt
    token: Count
    seen: Count


@with_config(ConfigDict(strict=True, extra="ignore"))
class BlendRecord(TypedDict):
    """An interval as a checkpoint keeps it. Its size is the same at any position."""

    start: Count
    seq_len: PositiveInt
    seed: Count
    domains: Annotated[dict[str, DomainRecord], Field(min_length=1)]


def check_record(record: BlendRecord, samples: int) -> None:
    """Raise a ValueError unless the shares fill a block, and every corpus with a share holds a window and has a place in its
    epoch."""
    if record["start"] > samples:
        raise ValueError(f"blend.start must be at most samples ({samples})")
    if sum(row["share"] for row in record["domains"].values()) != order.BLOCK:
        raise ValueError(f"blend.domains.share must add up to {order.BLOCK}")
    for name, row in record["domains"].items():
        if row["share"] and not units(row["tokens"], record["seq_len"]):
            raise ValueError(f"blend.domains.{name}.tokens must hold a window of {record['seq_len']}")
        if row["token"] > units(row["tokens"], row["unit"]) * row["unit"]:
            raise ValueError(f"blend.domains.{name}.token must be within its epoch")


def as_record(interval: Interval) -> BlendRecord:
    """The record for progress.json. `from_record` reads it."""
    rows = zip(interval.domains, interval.shares, interval.cursors, strict=True)
    domains: dict = {
        d.name: {"tokens": d.tokens, "content": d.content, "share": share, **cursor._asdict()}
        for d, share, cursor in rows
    }
    return {"start": interval.start, "seq_len": interval.seq_len, "seed": interval.seed, "domains": domains}


def from_record(record: BlendRecord) -> Interval:
    """The interval that `as_record` wrote."""
    rows = record["domains"]
    domains = tuple(Domain(name, row["tokens"], row["content"]) for name, row in rows.items())
    shares = tuple(row["share"] for row in rows.values())
    cursors = tuple(Cursor(row["epoch"], row["unit"], row["token"], row["seen"]) for row in rows.values())
    return Interval(record["start"], record["seq_len"], shares, domains, cursors, record["seed"])


def weights_of(kind: str, temperature: float, weights: list[float], tokens: list[int]) -> list[float]:
    """For kind "temperature": (weight · tokens)^(1/temperature). A temperature of 1 weighs by size, a higher one is flatter.
    Other kinds: the weights unchanged."""
    if kind != "temperature":
        return list(weights)
    sizes = [w * n for w, n in zip(weights, tokens, strict=True)]
    return [(size / max(sizes)) ** (1 / temperature) if size else 0.0 for size in sizes]
