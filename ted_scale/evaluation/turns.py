"""The ranks answer lm-eval's requests together: in batches, in turns, with as many forwards on every rank.

A batch is the one that lm-eval makes in a single process, so that its scores do not depend on the number of ranks. Note: a
forward under ZeRO-3 is a collective. A rank without a batch in the last turn does that of another rank once more.
"""

import itertools
from collections.abc import Callable

from ted_scale.base.errors import Preempted
from ted_scale.ranks import agree, pulse, signals


def batches_of(requests: list[tuple], rows: int) -> list[list[int]]:
    """The numbers of the requests in each batch, the longest texts first. A request is (strings, context, answer) in tokens; those
    that differ in their last token alone share a row."""
    sharing: dict[tuple, list[int]] = {}
    for number, (_, context, answer) in enumerate(requests):
        sharing.setdefault((*context, *answer[:-1]), []).append(number)
    texts = sorted(sharing, key=lambda text: (-len(text), text))
    return [
        [number for text in texts[first : first + rows] for number in sharing[text]]
        for first in range(0, len(texts), rows)
    ]


def batches_of_prompts(prompts: list[tuple[str, int]], rows: int) -> list[list[int]]:
    """The same for (how it is answered, length) of each prompt: a batch is answered in one way."""
    numbers = sorted(range(len(prompts)), key=lambda number: (prompts[number][0], -prompts[number][1]))
    ways = [list(some) for _, some in itertools.groupby(numbers, lambda number: prompts[number][0])]
    return [some[first : first + rows] for some in ways for first in range(0, len(some), rows)]


def answered(batches: list[list[int]], answer: Callable, device, what: str = "a batch of validation.suite") -> list:
    """The answers to all requests, on every rank. Raises Preempted on all ranks if a signal asks to stop."""
    (rank, world), mine = agree.share(), {}
    for first in range(0, len(batches), world):
        pulse.doing(what)
        if agree.anywhere(signals.asked.is_set(), device):
            raise Preempted
        numbers = batches[min(first + rank, len(batches) - 1)]
        mine |= zip(numbers, answer(numbers), strict=True)
    everyone = {number: value for theirs in agree.gather(mine) for number, value in theirs.items()}
    return [everyone[number] for number in range(len(everyone))]
