"""A frozen network whose blocks wait in the host's memory: each is copied to the device while the one before it computes.

Two places on the device take turns. A block's weights are views of one piece of host memory, so that a block is one copy. What
is outside the blocks (embedding, tail, head) stays on the device, where the losses read it. Note: on a CPU the same happens
in turn, without pinned memory and without a stream of its own.
"""

import contextlib
from functools import partial

import torch

ALIGNED = 256  # bytes: where kernels like a tensor to begin


def stream_blocks(network, blocks, device: torch.device) -> None:
    """Keeps the weights of `blocks`, which are in the host's memory, there, and moves all others to the device."""
    waiting = {id(weight) for weight in blocks.parameters()}
    for tensor in (*network.buffers(), *(p for p in network.parameters() if id(p) not in waiting)):
        tensor.data = tensor.data.to(device)
    BlockStream(blocks, device)


class Packed:
    """The weights of one block in one piece of host memory. `show` gives the block the copy of them on the device."""

    def __init__(self, block, pinned: bool):
        self.weights, self.ranges, end = list(block.parameters()), [], 0
        for weight in self.weights:
            first = -(-end // ALIGNED) * ALIGNED
            end = first + weight.nbytes
            self.ranges.append((first, end))
        self.bytes = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        self.here = self.views(self.bytes)
        for view, weight in zip(self.here, self.weights, strict=True):
            view.copy_(weight.data)
        self.hide()

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [
            memory[first:end].view(weight.dtype).view(weight.shape)
            for (first, end), weight in zip(self.ranges, self.weights, strict=True)
        ]

    def show(self, memory: torch.Tensor) -> None:
        for weight, view in zip(self.weights, self.views(memory), strict=True):
            weight.data = view

    def hide(self) -> None:
        for weight, view in zip(self.weights, self.here, strict=True):
            weight.data = view


class BlockStream:
    """The hooks of the blocks. `turn` is the place of the block that runs; meanwhile the other one is filled with the next
    block, after the last one with the first."""

    def __init__(self, blocks, device: torch.device):
        on_host = device.type == "cpu"
        self.packed = [Packed(block, pinned=not on_host) for block in blocks]
        largest = max(len(packed.bytes) for packed in self.packed)
        self.places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds, self.turn = [-1, -1], 0
        self.side = None if on_host else torch.cuda.Stream(device)
        self.filled, self.left = ([Reached(on_host) for _ in range(2)] for _ in range(2))
        for place in self.left:
            place.mark()  # what used the memory of the places before may still run
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self.begin, index))
            block.register_forward_hook(partial(self.end, index))

    def begin(self, index: int, *_) -> None:
        place = self.turn
        if self.holds[place] != index:  # the first call, or the one after a pass that broke off
            self.fill(place, index)
        self.filled[place].wait()
        self.packed[index].show(self.places[place])
        self.fill(1 - place, (index + 1) % len(self.packed))

    def end(self, index: int, *_) -> None:
        self.packed[index].hide()
        self.left[self.turn].mark()
        self.turn = 1 - self.turn

    def fill(self, place: int, index: int) -> None:
        host, self.holds[place] = self.packed[index].bytes, index
        with contextlib.nullcontext() if self.side is None else torch.cuda.stream(self.side):
            self.left[place].wait()
            self.places[place][: len(host)].copy_(host, non_blocking=True)
            self.filled[place].mark()


class Reached:
    """One stream's word to another that it has come so far; nothing where there is one thread of work."""

    def __init__(self, on_host: bool):
        self.event = None if on_host else torch.cuda.Event()

    def mark(self) -> None:
        if self.event:
            self.event.record()

    def wait(self) -> None:
        """The stream waits, not the host."""
        if self.event:
            torch.cuda.current_stream().wait_event(self.event)
