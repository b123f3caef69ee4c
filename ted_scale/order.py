"""Which window of which corpus stands at a position of training: a pure function of (seed, position).

Nothing is drawn ahead and nothing is stored, so resuming at position 10^9 costs what position 0 costs and no rank count
enters. A Feistel network shuffles, cycle walking fits it to any size. The surprise: in a blend the shares hold within
every block of 1000 samples, so a weight below 1/1000 is rounded up to that.
"""

from bisect import bisect_right
from itertools import accumulate

from ted_scale.errors import UserError

BLOCK = 1000
ROUNDS = 6
MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of some integers (splitmix64 finalizer, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) sends `index`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        index = _feistel(index, half, key)
        if index < size:
            return index


def _feistel(index: int, half: int, key: int) -> int:
    low = (1 << half) - 1
    left, right = index >> half, index & low
    for r in range(ROUNDS):
        left, right = right, left ^ (mix(key + r, right) & low)
    return left << half | right


def shares(weights: list[float]) -> tuple[int, ...]:
    """Samples of each corpus in a block: largest remainder, at least one for every weight above zero."""
    if any(not 0 <= w < float("inf") for w in weights) or not sum(weights):
        raise UserError(
            f"data.corpora.weight must be zero or more and above zero for one corpus, but is {weights}; correct it"
        )
    if sum(w > 0 for w in weights) > BLOCK:
        raise UserError(f"data.corpora must be {BLOCK} at most, but is {len(weights)}; put shards into one folder")
    exact = [BLOCK * w / sum(weights) for w in weights]
    counts = [max(int(e), w > 0) for e, w in zip(exact, weights, strict=True)]
    while sum(counts) != BLOCK:
        # The one furthest below its share gains, the one furthest above loses; nobody loses its last sample.
        step = 1 if sum(counts) < BLOCK else -1
        open_to = [c for c, n in enumerate(counts) if weights[c] > 0 and (step > 0 or n > 1)]
        counts[max(open_to, key=lambda c: step * (exact[c] - counts[c]))] += step
    return tuple(counts)


def pick(position: int, counts: tuple[int, ...], seed: int) -> tuple[int, int]:
    """(corpus, index of the sample within that corpus) at a position of the blend."""
    if BLOCK in counts:
        return counts.index(BLOCK), position
    block, slot = divmod(position, BLOCK)
    slot = permute(slot, BLOCK, mix(seed, -1, block))
    ends = list(accumulate(counts))
    corpus = bisect_right(ends, slot)
    return corpus, block * counts[corpus] + slot - (ends[corpus] - counts[corpus])


def windows(tokens: int, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens in an epoch, whatever its offset; 0 when not even one fits."""
    if tokens <= seq_len:
        return 0
    return max(1, (tokens - seq_len) // seq_len)


def window_start(sample: int, tokens: int, seq_len: int, key: int) -> int:
    """First token of a corpus's sample: the epoch's shuffle picks the window, the epoch's offset moves all cuts."""
    count = windows(tokens, seq_len)
    epoch, index = divmod(sample, count)
    epoch_key = mix(key, epoch)
    # Offset 0 .. seq_len-1, fewer where a lone window leaves less room.
    offset = mix(epoch_key, -1) % min(seq_len, tokens - count * seq_len)
    return offset + permute(index, count, epoch_key) * seq_len
