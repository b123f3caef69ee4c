"""Which of the teacher's blocks the student gets: spread evenly, listed, or those that change the states most.

A block's influence is 1 - the cosine between a token's state before and after it, as mean over the tokens (ShortGPT). The
block of the least influence is taken out, and the others are measured anew without it, until the student's number is left.
Influences of the whole teacher are no measure for a deep cut: two blocks of small influence may do the same work, of which one
must stay. docs/results.md has the numbers.
"""

import contextlib
from collections.abc import Callable, Iterable

import torch

from ted_scale.base.errors import UserError
from ted_scale.models.anatomy import Anatomy, run_body


def spread(count: int, layers: int) -> list[int]:
    """`count` of `layers` blocks: the first, the last, and the others evenly between. A single one is the first, which was
    trained on embeddings."""
    gaps = max(1, count - 1)
    return [(2 * k * (layers - 1) + gaps) // (2 * gaps) for k in range(count)]


def choose_blocks(layers: int, count: int | None, keep: str | None) -> list[int]:
    """In order."""
    if keep is not None:
        return parse_keep(layers, count, keep)
    check_count(layers, count)
    return spread(count, layers)


def check_count(layers: int, count: int | None) -> None:
    if count is None or not 1 <= count <= layers:
        raise UserError(f"--layers must be 1 to {layers}, the teacher's blocks, but is {count}; or list them by --keep")


def parse_keep(layers: int, count: int | None, keep: str) -> list[int]:
    try:
        blocks = [int(part) for part in keep.split(",")]
    except ValueError:
        raise UserError(f"--keep must list block numbers like 0,2,5, but is '{keep}'") from None
    if any(not 0 <= b < layers for b in blocks) or blocks != sorted(set(blocks)):
        raise UserError(f"--keep must list blocks 0 to {layers - 1} in rising order, each once, but is '{keep}'")
    if count not in (None, len(blocks)):
        raise UserError(f"--layers must be how many blocks --keep lists ({len(blocks)}), but is {count}; leave it out")
    return blocks


def most_influential(
    influence: Callable[[list[int]], dict[int, float]], layers: int, count: int, *, ends: bool
) -> list[int]:
    """`influence` gives that of each of the blocks it gets, as a model of these blocks has it. With `ends` the first and the last
    stay; a single one is the first."""
    kept = list(range(layers))
    while len(kept) > count:
        found = influence(kept)
        safe = {0, layers - 1 if count > 1 else 0} if ends else set()
        kept.remove(min((b for b in kept if b not in safe), key=found.__getitem__))
    return kept


@torch.no_grad()
def influences(network, anatomy: Anatomy, batches: Iterable, kept: list[int]) -> dict[int, float]:
    """Of the blocks in `kept`, in a model without the others."""
    sums, tokens = dict.fromkeys(kept, 0.0), 0
    blocks = network.get_submodule(anatomy.blocks)

    def watcher(number: int):
        def watch(module, args, kwargs, output):
            alike = torch.nn.functional.cosine_similarity(state(args, kwargs).float(), first(output).float(), dim=-1)
            sums[number] += float((1 - alike).sum())

        return watch

    with without(blocks, set(range(anatomy.layers)) - set(kept)):
        handles = [blocks[number].register_forward_hook(watcher(number), with_kwargs=True) for number in kept]
        for batch in batches:
            run_body(network, anatomy, batch.tokens_BT, batch.packing)
            tokens += batch.tokens_BT.numel()
        for handle in handles:
            handle.remove()
    return {number: total / tokens for number, total in sums.items()}


def state(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def without(blocks, taken: set[int]):
    """The blocks pass on the states that they get. They stay in the list, because families know by a place in it what kind of
    block is there."""
    for number in taken:
        blocks[number].forward = lambda *args, **kwargs: state(args, kwargs)
    try:
        yield
    finally:
        for number in taken:
            del blocks[number].forward
