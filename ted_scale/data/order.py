"""Which corpus each position of training reads, and how an epoch is shuffled: pure functions of a seed.

Nothing is drawn ahead and nothing is stored. So a resume at position 10^9 costs the same as one at position 0, and the number of
ranks does not matter. A Feistel network shuffles; cycle walking fits it to any size. Note: every block of 1000 samples has the
shares of the blend, so a share below 1/1000 becomes 1/1000.
"""

import hashlib
from functools import lru_cache
from itertools import islice

from ted_scale.base.errors import UserError

BLOCK = 1000
ROUNDS = 6
MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of some integers (splitmix64 finalizer, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = absorb(state, value)
    return state


def absorb(state: int, value: int) -> int:
    state = (state ^ (value & MASK)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31


@lru_cache(maxsize=1024)
def name_key(seed: int, name: str) -> int:
    """The key of one corpus. It does not depend on other corpora, so they can be added or removed without a change of its order."""
    return mix(seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


@lru_cache(maxsize=1024)
def round_keys(key: int) -> tuple[int, ...]:
    return tuple(mix(key + r) for r in range(ROUNDS))


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under a keyed permutation of range(size)."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys, low = round_keys(key), (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for state in keys:
            left, right = right, left ^ (absorb(state, right) & low)
        index = left << half | right
        if index < size:
            return index


def shares(weights: list[float]) -> tuple[int, ...]:
    """Samples of each corpus in a block, by largest remainder. Every weight above zero gets at least one."""
    if any(not 0 <= w < float("inf") for w in weights) or not sum(weights):
        raise UserError(
            f"data.corpora.weight must be zero or more and above zero for one corpus, but is {weights}; correct it"
        )
    if sum(w > 0 for w in weights) > BLOCK:
        raise UserError(f"data.corpora must be {BLOCK} at most, but is {len(weights)}; put shards into one folder")
    exact = [BLOCK * w / sum(weights) for w in weights]
    counts = [max(int(e), int(w > 0)) for e, w in zip(exact, weights, strict=True)]
    while sum(counts) != BLOCK:
        # The corpus furthest below its share gains a sample. The one furthest above loses one, but never its last.
        step = 1 if sum(counts) < BLOCK else -1
        open_to = [c for c, n in enumerate(counts) if weights[c] > 0 and (step > 0 or n > 1)]
        counts[max(open_to, key=lambda c: step * (exact[c] - counts[c]))] += step
    return tuple(counts)


def pick(position: int, counts: tuple[int, ...], seed: int) -> tuple[int, int]:
    """(corpus, number of its samples before) at a position of the blend."""
    if BLOCK in counts:
        return counts.index(BLOCK), position
    block, slot = divmod(position, BLOCK)
    dealt = deal(counts, mix(seed, -1, block))
    return dealt[slot], block * counts[dealt[slot]] + dealt[:slot].count(dealt[slot])


def taken(position: int, counts: tuple[int, ...], seed: int) -> list[int]:
    """Samples of each corpus before a position of the blend."""
    block, slot = divmod(position, BLOCK)
    dealt = deal(counts, mix(seed, -1, block))[:slot] if slot else ()
    return [block * n + dealt.count(corpus) for corpus, n in enumerate(counts)]


def until(samples: int, corpus: int, counts: tuple[int, ...], seed: int) -> int:
    """The first position of the blend before which a corpus has given `samples` samples, at least one."""
    block, more = divmod(samples - 1, counts[corpus])
    slots = (slot for slot, dealt in enumerate(deal(counts, mix(seed, -1, block))) if dealt == corpus)
    return block * BLOCK + next(islice(slots, more, None)) + 1


@lru_cache(maxsize=4)
def deal(counts: tuple[int, ...], key: int) -> tuple[int, ...]:
    """One shuffled block: the corpus of each of its slots."""
    cards = [corpus for corpus, n in enumerate(counts) for _ in range(n)]
    return tuple(cards[permute(slot, BLOCK, key)] for slot in range(BLOCK))
