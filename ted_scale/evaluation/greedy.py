"""Text that a model writes in training, the likeliest token each time, by forwards of whole rows without a cache.

Note: a forward under ZeRO-3 is a collective, so every rank makes as many: a text that ends early is written on, and cut afterwards.
All forwards of a process have one shape, so that compiled blocks are compiled for it once.
"""

from collections.abc import Callable

import torch

from ted_scale.base.errors import Preempted
from ted_scale.data.stream import Batch
from ted_scale.evaluation import turns
from ted_scale.ranks import agree, pulse, signals

WHAT = "a turn of samples"
LOOK_TOKENS = 8  # between two looks whether a signal asks to stop, for which the host waits


def written(logits: Callable, prompts: list[list[int]], tokens: int, vocabulary: int, device) -> list[list[int]]:
    """So many tokens after each prompt, on all ranks. `logits` takes a Batch and a position in it to [B, V]. A rank has one prompt
    at a time. Raises Preempted on all ranks if a signal asks to stop."""
    length = max(map(len, prompts)) + tokens

    def answer(numbers: list[int]) -> list[list[int]]:
        (number,) = numbers
        return [goes_on(logits, prompts[number], tokens, length, vocabulary, device)]

    each = [[number] for number in range(len(prompts))]
    return turns.answered(each, answer, device, WHAT)


@torch.no_grad()
def goes_on(logits: Callable, prompt: list[int], tokens: int, length: int, vocabulary: int, device) -> list[int]:
    """What stands right of a token cannot change it, so a row is filled up with zeros. Each token has its own time limit: a turn
    may be as many forwards of a slow teacher, and a healthy run would end as one that hangs."""
    row_1T = torch.zeros(1, length, dtype=torch.long)
    row_1T[0, : len(prompt)] = torch.tensor(prompt)
    row_1T = row_1T.to(device)
    for at in range(len(prompt), len(prompt) + tokens):
        pulse.doing(WHAT)
        if (at - len(prompt)) % LOOK_TOKENS == LOOK_TOKENS - 1 and agree.anywhere(signals.asked.is_set(), device):
            raise Preempted
        row_1T[0, at] = logits(Batch(row_1T, None, None, None), at - 1)[0, :vocabulary].argmax()
    return row_1T[0, len(prompt) : len(prompt) + tokens].tolist()


def until(ids: list[int], end: int) -> list[int]:
    """Up to the token that ends a document, if it is there."""
    return ids[: ids.index(end)] if end in ids else ids
