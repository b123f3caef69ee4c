"""Where a run stands in each corpus of its blend, and how it goes on when the blend or seq_len changes.

An interval is a stretch of samples with one set of shares and one seq_len; its cursors say where each corpus stood when
it began. Everything later follows from them and a position, so this is all that a checkpoint keeps of the data. The
surprise: a corpus's epoch is cut in units of the seq_len that it began with. Under another seq_len its windows are put
together from such units until the epoch ends, so that no token of it comes twice or never.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ted_scale.data import order


class Cursor(NamedTuple):
    """`token` tokens of an epoch that was cut in units of `unit` tokens were read; `seen` are those of all epochs."""

    epoch: int
    unit: int
    token: int
    seen: int


class Domain(NamedTuple):
    """What an interval needs to know of a corpus; `content` tells its shards and their order from others."""

    name: str
    tokens: int
    content: str = ""


class Interval(NamedTuple):
    start: int  # first sample
    seq_len: int
    shares: tuple[int, ...]  # samples in a block of order.BLOCK, a number a domain
    domains: tuple[Domain, ...]
    cursors: tuple[Cursor, ...]  # at the start, one a domain
    seed: int

    @property
    def key(self) -> int:
        return order.mix(self.seed, self.start) if self.start else self.seed

    def at(self, position: int) -> tuple[int, Cursor]:
        """(domain, where in it) of a sample."""
        which, index = order.pick(position - self.start, self.shares, self.key)
        return which, self.ahead(which, index)

    def cursors_at(self, position: int) -> tuple[Cursor, ...]:
        """Where every domain stands before the sample at `position`."""
        counts = order.taken(position - self.start, self.shares, self.key)
        return tuple(self.ahead(which, count) for which, count in enumerate(counts))

    def ahead(self, which: int, samples: int) -> Cursor:
        """A domain's cursor after some of its samples. The last window of an epoch cut for another seq_len may be short."""
        if not samples:  # of a corpus that left there may not even be a window
            return self.cursors[which]
        cursor, tokens = self.cursors[which], self.domains[which].tokens
        left = order.units(tokens, cursor.unit) * cursor.unit - cursor.token
        here = -(-left // self.seq_len)
        if samples < here:
            read = samples * self.seq_len
            return cursor._replace(token=cursor.token + read, seen=cursor.seen + read)
        epochs, index = divmod(samples - here, order.units(tokens, self.seq_len))
        seen = cursor.seen + left + (samples - here) * self.seq_len
        return Cursor(cursor.epoch + 1 + epochs, self.seq_len, index * self.seq_len, seen)

    def pieces(self, which: int, cursor: Cursor) -> Iterator[tuple[int, int]]:
        """(first token, tokens) in the domain of what makes up the window at a cursor: one piece, or several units'."""
        domain = self.domains[which]
        cut = order.cut(domain.tokens, cursor.unit, order.name_key(self.seed, domain.name), cursor.epoch)
        token, end = cursor.token, min(cursor.token + self.seq_len, cut.tokens)
        while token < end:
            index, inside = divmod(token, cut.unit)
            length = min(cut.unit - inside, end - token)
            yield cut.start(index) + inside, length
            token += length


def begin(domains: list[Domain], shares: tuple[int, ...], seq_len: int, seed: int) -> Interval:
    fresh = tuple(Cursor(0, seq_len, 0, 0) for _ in domains)
    return Interval(0, seq_len, shares, tuple(domains), fresh, seed)


def follow(
    before: Interval, position: int, domains: Sequence[Domain], shares: tuple[int, ...], seq_len: int
) -> Interval:
    """The same interval where nothing changed, else the next one, from `position` on. A corpus that left is remembered."""
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
    """An epoch under way is finished as it was cut; one of a corpus that changed meanwhile cannot be."""
    if cursor is None:
        return Cursor(0, seq_len, 0, 0)
    if cursor.token and domain == before:
        return cursor
    return Cursor(cursor.epoch + bool(cursor.token), seq_len, 0, cursor.seen)


def changes(before: Interval, after: Interval) -> list[str]:
    """What a run must say of corpora and shares that follow others, a sentence a change."""
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
    """Other shards, or another part of them held out."""
    return f"corpus {domain.name} holds other text to train on, {domain.tokens} tokens instead of {was.tokens}"


def other_texts(earlier: Interval | None, after: Interval) -> list[str]:
    """What a stage must say of the corpora that the stage before read."""
    old = {domain.name: domain for domain in earlier.domains} if earlier else {}
    known = ((old[domain.name], domain) for domain in after.domains if domain.name in old)
    return [f"from this stage on {other_text(was, domain)}" for was, domain in known if was != domain]


def as_dict(interval: Interval) -> dict:
    """For a checkpoint: small whatever the position."""
    rows = zip(interval.domains, interval.shares, interval.cursors, strict=True)
    domains = {
        d.name: {"tokens": d.tokens, "content": d.content, "share": share, **cursor._asdict()}
        for d, share, cursor in rows
    }
    return {"start": interval.start, "seq_len": interval.seq_len, "seed": interval.seed, "domains": domains}


def from_dict(state: dict) -> Interval:
    rows = state["domains"]
    domains = tuple(Domain(name, row["tokens"], row["content"]) for name, row in rows.items())
    shares = tuple(row["share"] for row in rows.values())
    cursors = tuple(Cursor(*(row[field] for field in Cursor._fields)) for row in rows.values())
    return Interval(state["start"], state["seq_len"], shares, domains, cursors, state["seed"])


def weights_of(kind: str, temperature: float, weights: list[float], tokens: list[int]) -> list[float]:
    """temperature: (weight · tokens)^(1/temperature), so that 1 is by size and more is flatter. Others: as they stand."""
    if kind != "temperature":
        return list(weights)
    sizes = [w * n for w, n in zip(weights, tokens, strict=True)]
    return [(size / max(sizes)) ** (1 / temperature) if size else 0.0 for size in sizes]
