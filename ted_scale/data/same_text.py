"""All ranks must read the same text: the ranks compare their listings of the corpora before a stage reads.

If ranks differ, all of them list again for a while. A client of a file server may have cached an old listing, or a shard may
still be arriving. Note: ranks with different listings would train on text that others validate on. They would read windows twice
or never, and enter collectives of different length.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from ted_scale.base.errors import Gone, UserError
from ted_scale.corpora.corpus import Part, list_again
from ted_scale.data.stream import Stream
from ted_scale.ranks.agree import gather

log = logging.getLogger("ted_scale")

PATIENCE_S, PAUSE_S = 90.0, 5.0  # an NFS client may show an old listing for 60 s
NAMED = 4  # ranks that a sentence names


class Listed(NamedTuple):
    """A rank's listing of a corpus: the text to train on and the held-out text."""

    shards: int
    tokens: int
    held_out: int
    digest: str

    def __str__(self):
        return f"{self.shards:,} shards of {self.tokens + self.held_out:,} tokens, {self.held_out:,} held out, digest {self.digest}"


def open_together(open_stage: Callable[[], tuple]) -> tuple:
    """The result of `open_stage` on every rank. Its first value is the stage's stream. A collective."""
    until = time.monotonic() + PATIENCE_S
    while True:
        opened, reading = attempt(open_stage)
        late = time.monotonic() > until
        everyone = gather((reading, late))
        readings = [reading for reading, _ in everyone]
        if opened and all(other == reading for other in readings):
            return opened
        hopeless = all(isinstance(reading, UserError) for reading in readings)
        if hopeless or any(late for _, late in everyone):
            raise unlike(readings)
        log.info(
            f"the ranks list different text, so all list it again, for {PATIENCE_S:g} s at most: {unlike(readings)}"
        )
        time.sleep(PAUSE_S)
        list_again()


def attempt(open_stage: Callable[[], tuple]) -> tuple:
    """(what was opened, what it reads by corpus), or (None, the error) if it cannot be opened."""
    try:
        opened = open_stage()
    except (UserError, Gone) as error:
        return None, error
    return opened, what_is_read(opened[0])


def what_is_read(stream: Stream) -> dict[str, Listed]:
    held_out = {name: held.parts[name] for name, held in stream.held_out.items()}
    names = {**stream.parts, **held_out}
    return {name: listed(stream.parts.get(name), held_out.get(name), packs_of(stream, name)) for name in names}


def packs_of(stream: Stream, name: str) -> list[str]:
    """The digests of a corpus's packs, if it has any."""
    return [of.packs[name].digest.hex()[:16] for of in (stream, *stream.held_out.values()) if name in of.packs]


def listed(training: Part | None, held_out: Part | None, packed: list[str]) -> Listed:
    part = training or held_out  # both have the same shards, and one begins where the other ends
    tokens, kept = (each.tokens if each else 0 for each in (training, held_out))
    return Listed(len(part.shards), tokens, kept, " ".join([part.listed, *packed]))


def unlike(readings: list) -> UserError | Gone:
    """Why the ranks cannot go on: the first error of any rank, or the first corpus of which they list different text."""
    failed = [rank for rank, reading in enumerate(readings) if isinstance(reading, Exception)]
    if failed:
        some = f" (so on {named(failed)}, not on the others)" if len(failed) < len(readings) else ""
        return type(readings[failed[0]])(f"{readings[failed[0]]}{some}")
    names = dict.fromkeys(name for reading in readings for name in reading)
    name = next(name for name in names if len({reading.get(name) for reading in readings}) > 1)
    groups: dict[Listed, list[int]] = {}
    for rank, reading in enumerate(readings):
        groups.setdefault(reading.get(name), []).append(rank)
    seen = " and ".join(f"{listing} on {named(ranks)}" for listing, ranks in groups.items())
    return Gone(
        f"corpus {name} must be the same text on all ranks, but is {seen}; start the same command again when no file of it "
        "changes any more"
    )


def named(ranks: list[int]) -> str:
    numbers = ", ".join(map(str, ranks[:NAMED])) + (", …" if len(ranks) > NAMED else "")
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"
