"""A cut against random cuts of the same size, by the loss on held-out text before any training.

    python tools/bench/random_cuts.py 10 TEACHER OUT --text PREFIX ...

Takes the words of tools/cut_student.py after the number of random cuts, and writes each of them over OUT. A random cut in depth
keeps the first and the last block, unless --free-ends is given. docs/results.md has what was measured.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.commands.cut_student import Cut, cut_of, parse, prepare, write
from ted_scale.commands.cutting.channels import choose_channels
from ted_scale.commands.cutting.importance import Importance
from ted_scale.models.inspection import inspect


def random_blocks(layers: int, count: int, *, ends: bool, seed: int) -> list[int]:
    kept = {0, layers - 1} if ends and count > 1 else set()
    rest = [block for block in range(layers) if block not in kept]
    return sorted({*kept, *random.Random(seed).sample(rest, count - len(kept))})


def random_importance(cutter, seed: int) -> Importance:
    """Of the sizes of the teacher: each channel and each head is as likely as any other."""
    dice = torch.Generator().manual_seed(seed)
    own, layers = cutter.own, range(cutter.anatomy.layers)
    return Importance(
        torch.rand(own.hidden, generator=dice),
        {block: torch.rand(own.ffn, generator=dice) for block in layers},
        {block: torch.rand(own.heads, generator=dice) for block in layers},
    )


def random_cut(arguments, chosen: Cut, layers: int, seed: int) -> Cut:
    blocks, cutter = chosen.blocks, chosen.cutter
    if len(blocks) < layers:
        blocks = random_blocks(layers, len(blocks), ends=not arguments.free_ends, seed=seed)
    if cutter:
        kept = choose_channels(random_importance(cutter, seed), cutter.own, cutter.sizes)
        cutter = cutter._replace(kept=kept)
    return chosen._replace(blocks=blocks, cutter=cutter)


def main(argv: list[str] | None = None) -> None:
    count, *words = (argv if argv is not None else sys.argv[1:]) or [""]
    arguments = parse([*words, "--overwrite"])
    if not count.isdigit() or not arguments.text:
        raise UserError(f"the words must begin with how many random cuts, and have --text, but are {count} {words}")
    teacher, sizes, text = prepare(arguments)
    chosen, losses = cut_of(arguments, teacher, sizes, text, text.model(teacher)), []
    for seed in (None, *range(int(count))):
        cut = chosen if seed is None else random_cut(arguments, chosen, teacher.layers, seed)
        write(arguments, teacher, cut, None, None)  # as cut, not fitted
        losses.append(text.loss(text.model(inspect("OUT", str(arguments.out)))))
        print(f"{'chosen' if seed is None else f'random {seed}'}: {losses[-1]:.4f}, blocks {cut.blocks}", flush=True)
    print(f"chosen {losses[0]:.3f}; random, best first: {', '.join(f'{loss:.3f}' for loss in sorted(losses[1:]))}")


if __name__ == "__main__":
    run_main(main)
