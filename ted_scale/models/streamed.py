"""A frozen network whose blocks are in the host's memory. Each block is copied to the device while the one before it computes.

Two places on the device are used in turn. A block's weights are views of one piece of host memory, so a block needs one copy. The
modules outside the blocks (embedding, tail, head) stay on the device, where the losses read them. Note: on a CPU copy and compute
run one after the other, without pinned memory and without a second stream.
"""

import contextlib
from functools import partial

import torch

ALIGNED = 256  # bytes: an alignment that suits kernels


def stream_blocks(network, blocks, device: torch.device) -> None:
    """Keep the weights of `blocks` in the host's memory, where they are, and move all others to the device."""
    waiting = {id(weight) for weight in blocks.parameters()}
    for tensor in (*network.buffers(), *(p for p in network.parameters() if id(p) not in waiting)):
        tensor.data = tensor.data.to(device)
    BlockStream(blocks, device)


class Packed:
    """The weights of one block in one piece of host memory. `show` gives the block their copy on the device."""

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
    """The hooks of the blocks. `turn` is the place of the block that runs. Meanwhile the other place is filled with the next
    block, and after the last block with the first."""

    def __init__(self, blocks, device: torch.device):
        on_host = device.type == "cpu"
        self.packed = [Packed(block, pinned=not on_host) for block in blocks]
        largest = max(len(packed.bytes) for packed in self.packed)
        self.places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds, self.turn = [-1, -1], 0
        self.side = None if on_host else torch.cuda.Stream(device)
        self.filled, self.left = ([Reached(on_host) for _ in range(2)] for _ in range(2))
        for place in self.left:
            place.mark()  # earlier work on this memory may still run
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self.begin, index))
            block.register_forward_hook(partial(self.end, index))

    def begin(self, index: int, *_) -> None:
        place = self.turn
        if self.holds[place] != index:  # the first call, or the first after an interrupted pass
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
    """Marks how far one stream has come, so that another can wait for it. On a CPU it does nothing."""

    def __init__(self, on_host: bool):
        self.event = None if on_host else torch.cuda.Event()

    def mark(self) -> None:
        if self.event:
            self.event.record()

    def wait(self) -> None:
        """Make the current stream wait. The host does not wait."""
        if self.event:
            torch.cuda.current_stream().wait_event(self.event)
