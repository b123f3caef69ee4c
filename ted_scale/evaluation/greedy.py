"""Text that a model writes in training, the likeliest token each time, by forwards of whole rows without a cache.

Note: a forward under ZeRO-3 is a collective, so every rank makes as many: a text that ends early is written on, and cut afterwards.
All forwards of samples have one shape, so that compiled blocks are compiled for it once; those of answers end with the last answer.
"""

from collections.abc import Callable

import torch

from ted_scale.base.errors import Preempted
from ted_scale.data.stream import Batch
from ted_scale.evaluation import turns
from ted_scale.ranks import agree, pulse, signals

WHAT, OF_SUITE = "a turn of samples", "an answer of validation.suite"
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


@torch.no_grad()
def answers(logits: Callable, prompts: list[list[int]], tokens: int, ended: Callable, device) -> list[list[int]]:
    """At most so many tokens after each of a rank's prompts, in one row each. `logits` takes a Batch and a position in each row to
    [B, V]. Raises Preempted on all ranks if a signal asks to stop."""
    rows_BT = torch.zeros(len(prompts), max(map(len, prompts)) + tokens, dtype=torch.long)
    for row_T, prompt in zip(rows_BT, prompts, strict=True):
        row_T[: len(prompt)] = torch.tensor(prompt)
    rows_BT, each = rows_BT.to(device), torch.arange(len(prompts), device=device)
    starts_B, count = torch.tensor([len(prompt) for prompt in prompts], device=device), 0

    def so_far() -> list[list[int]]:
        most = min(count, tokens)
        return [row_T[len(prompt) :][:most].tolist() for row_T, prompt in zip(rows_BT, prompts, strict=True)]

    while count % LOOK_TOKENS or anyone_writes(count < tokens and not all(map(ended, so_far())), device):
        pulse.doing(OF_SUITE)
        next_B = logits(Batch(rows_BT, None, None, None), starts_B + min(count, tokens) - 1).argmax(-1)
        if count < tokens:  # else another rank writes on
            rows_BT[each, starts_B + count] = next_B
        count += 1
    return so_far()


def anyone_writes(this_rank: bool, device) -> bool:
    if agree.anywhere(signals.asked.is_set(), device):
        raise Preempted
    return agree.anywhere(this_rank, device)


def until(ids: list[int], end: int) -> list[int]:
    """`ids` before the first token that ends a document, or all of them."""
    return ids[: ids.index(end)] if end in ids else ids
