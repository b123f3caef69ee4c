"""Fits the matrices of a cut student to its teacher on text, in closed form, before any training.

Block after block, and in a block matrix after matrix, the student gets weights that give, from what a matrix reads in the student
by now, what the same matrix gives in the teacher: a ridge regression towards the weights of the cut. The last matrix of a block
gives what the states still lack to be the teacher's where the next kept block begins, so it makes up for the blocks between as
far as it can. Note: of all tokens the states of both models are kept, and what the matrices of one block read and give.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ted_scale.base.errors import UserError
from ted_scale.base.exits import speak
from ted_scale.commands.cutting.axes import input_dim, is_matrix
from ted_scale.commands.cutting.blocks import first, state
from ted_scale.commands.cutting.channels import Cutter
from ted_scale.models.anatomy import Anatomy, run_body

RIDGE = 0.1  # of the mean square of what a matrix reads; design note 40 has the losses with others


class Call(NamedTuple):
    """What a block gets beside its states."""

    args: tuple
    kwargs: dict

    def run(self, block, states: torch.Tensor) -> torch.Tensor:
        if "hidden_states" in self.kwargs:
            return first(block(**{**self.kwargs, "hidden_states": states}))
        return first(block(states, *self.args, **self.kwargs))


class Walk:
    """The states of a text on their way through a model's blocks."""

    def __init__(self, network, anatomy: Anatomy, batches: Iterable):
        self.network, self.anatomy = network, anatomy
        self.blocks, self.at = network.get_submodule(anatomy.blocks), 0
        self.states: list[torch.Tensor] = []  # by batch
        self.calls: list[list[Call]] = []  # by batch, of each block
        for batch in batches:
            self.begin(batch)

    def begin(self, batch) -> None:
        calls: list[Call] = []

        def note(module, args, kwargs):
            if not calls:
                self.states.append(state(args, kwargs))
            calls.append(Call(args[1:], kwargs))

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
        run_body(self.network, self.anatomy, batch.tokens_BT, batch.packing)
        remove(handles)
        self.calls.append(calls)

    @property
    def block(self):
        """The next one."""
        return self.blocks[self.at]

    def outputs(self) -> Iterable[torch.Tensor]:
        for states, calls in zip(self.states, self.calls, strict=True):
            yield calls[self.at].run(self.block, states)

    def go(self, to: int) -> None:
        while self.at < to:
            self.states = list(self.outputs())
            self.at += 1


@torch.no_grad()
def refit(teacher: Walk, student: Walk, blocks: list[int], cutter: Cutter | None) -> dict[str, torch.Tensor]:
    """The fitted tensors, by name and in fp32. `blocks` are the student's, by their numbers in the teacher."""
    fitted = {}
    for number, origin in enumerate(blocks):
        speak(f"fitting block {number + 1} of {len(blocks)} to the teacher")
        teacher.go(origin)
        groups = matrices_of(student)
        seen = watch(teacher, groups).gives
        gives = {name: kept(name, given, teacher, student, cutter) for name, given in seen.items()}
        makes_up = adds(student, groups[-1][0])
        for names in groups[:-1] if makes_up else groups:
            fitted |= fit(student, names, [gives[name] for name in names])
        teacher.go(blocks[number + 1] if number + 1 < len(blocks) else len(teacher.blocks))
        if makes_up:
            hidden = cutter.kept.hidden if cutter else slice(None)
            fitted |= make_up(student, groups[-1][0], [states[..., hidden] for states in teacher.states])
        student.go(number + 1)
    return fitted


def matrices_of(walk: Walk) -> list[list[str]]:
    """The names of the next block's matrices as they run. Those that read the same have one regression; the last has its own."""
    ran: list[tuple[str, torch.Tensor, bool]] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: ran.append((name, args[0], m.bias is None)))
        for name, module in walk.block.named_modules()
        if is_matrix(module)
    ]
    next(iter(walk.outputs()))
    remove(handles)
    groups = [[ran[0][0]]]
    for (_, reads, plain), (name, reads_too, plain_too) in itertools.pairwise(ran):
        if reads_too is reads and plain_too == plain and name != ran[-1][0]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


class Seen(NamedTuple):
    """Of a block that ran on all batches: what it gave, and what its matrices read and gave, by name."""

    outputs: list[torch.Tensor]
    reads: dict[str, list[torch.Tensor]]
    gives: dict[str, list[torch.Tensor]]


def watch(walk: Walk, groups: list[list[str]]) -> Seen:
    reads: dict[str, list] = {}
    gives: dict[str, list] = {}

    def keep(name: str):
        def hook(module, args, output):
            reads.setdefault(name, []).append(args[0])
            gives.setdefault(name, []).append(output)

        return hook

    handles = [walk.block.get_submodule(name).register_forward_hook(keep(name)) for names in groups for name in names]
    outputs = list(walk.outputs())
    remove(handles)
    return Seen(outputs, reads, gives)


def kept(name: str, gives: list, teacher: Walk, student: Walk, cutter: Cutter | None) -> list[torch.Tensor]:
    """What a matrix of the teacher gives, at the outputs that the student has."""
    if cutter is None:
        return gives
    whole, cut = (walk.block.get_submodule(name) for walk in (teacher, student))
    place = f"{teacher.anatomy.blocks}.{teacher.at}.{name}.weight"
    cuts = cutter.cuts(place, teacher.network, whole.weight.shape, cut.weight.shape)
    outputs = cuts.get(1 - input_dim(whole), slice(None))
    return [given[..., outputs] for given in gives]


def adds(walk: Walk, name: str) -> bool:
    """Whether a block adds to the states what this matrix gives. Some families have a norm or a factor between."""
    given: list[torch.Tensor] = []

    def silenced(matrix, arguments, output):
        given.append(output)
        return output * 0

    whole = next(iter(walk.outputs())).float()
    handle = walk.block.get_submodule(name).register_forward_hook(silenced)
    change = whole - next(iter(walk.outputs())).float()
    handle.remove()
    gave = given[0].float().view_as(change)
    slope = float((change * gave).sum() / gave.square().sum())
    return abs(slope - 1) < 0.02 and float((change - gave).norm() / gave.norm()) < 0.5  # in bf16, too


def fit(walk: Walk, names: list[str], wanted: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    reads = watch(walk, [names[:1]]).reads[names[0]]
    targets = (torch.cat([rows(t) for t in of_batch], 1) for of_batch in zip(*wanted, strict=True))
    return solve(walk, names, reads, targets)


def make_up(walk: Walk, name: str, goals: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    seen = watch(walk, [[name]])
    each = zip(goals, seen.outputs, seen.gives[name], strict=True)
    lacks = (rows(goal) - (rows(output) - rows(gave)) for goal, output, gave in each)
    return solve(walk, [name], seen.reads[name], lacks)


def rows(states: torch.Tensor) -> torch.Tensor:
    return states.flatten(0, -2).float()


def solve(
    walk: Walk, names: list[str], reads: list[torch.Tensor], targets: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """These matrices read the same, and have a bias or none. Solved for the change: where nothing lacks, nothing changes."""
    matrices = [walk.block.get_submodule(name) for name in names]
    now = torch.cat([as_map(m) for m in matrices], 1)
    square = mixed = torch.zeros(())
    for read, target in zip(map(rows, reads), targets, strict=True):
        if len(now) > read.shape[1]:
            read = torch.cat([read, torch.ones_like(read[:, :1])], 1)
        lacks = target - read @ now
        square, mixed = square + (read.T @ read).double(), mixed + (read.T @ lacks).double()
    ridge = RIDGE * square.diagonal().mean() or 1.0  # of a matrix that reads zeros alone
    found = now + torch.linalg.solve(square + ridge * torch.eye(len(now)).to(square), mixed).float()
    place = f"{walk.anatomy.blocks}.{walk.at}"
    if not found.isfinite().all():
        raise UserError(
            f"--dtype must be one in which the states of --text are finite, but {place}.{names[0]} reads others; take float32"
        )
    widths = [as_map(m).shape[1] for m in matrices]
    each = zip(names, matrices, found.split(widths, 1), strict=True)
    return {f"{place}.{name}.{key}": value for name, m, new in each for key, value in put(m, new).items()}


def as_map(matrix) -> torch.Tensor:
    """[inputs, outputs], and the bias as a last row."""
    weight = matrix.weight.T if input_dim(matrix) == 1 else matrix.weight
    return (weight if matrix.bias is None else torch.cat([weight, matrix.bias[None]])).float()


def put(matrix, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Write the values into the matrix, in its type. Returns the unrounded values, for the file."""
    weight = values if matrix.bias is None else values[:-1]
    new = {"weight": weight.T if input_dim(matrix) == 1 else weight}
    new |= {} if matrix.bias is None else {"bias": values[-1]}
    for key, value in new.items():
        getattr(matrix, key).copy_(value)
    return {key: value.cpu() for key, value in new.items()}


def remove(handles) -> None:
    for handle in handles:
        handle.remove()
