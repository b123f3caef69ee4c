"""The positions of documents in a batch: computed once on the host, so that no forward has to read the device.

The rows of a batch count as one line of B * T tokens. The start of a row is always a border, because another sample is
before it. Note: positions also begin at 0 in a window that begins within a document, and in a piece that follows another
piece, because attention sees nothing before it.
"""

import functools
import itertools
from typing import NamedTuple

import numpy
import torch


class Packing(NamedTuple):
    positions_BT: torch.Tensor  # int64, from 0 in every document
    borders: torch.Tensor  # int32: the token at which each document begins, and B * T
    lengths: tuple[int, ...]  # the distances between borders, on the host

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def moved(self, move) -> "Packing":
        return Packing(move(self.positions_BT), move(self.borders), self.lengths)


class Share(NamedTuple):
    """Which tokens of its rows a rank has, where several ranks share them: piece `index` of `of` equal ones of each row. A
    packing beside it is that of the whole rows."""

    index: int
    of: int
    positions_BT: torch.Tensor  # of these tokens

    def moved(self, move) -> "Share":
        return self._replace(positions_BT=move(self.positions_BT))


def pack(begins_BT: numpy.ndarray) -> Packing:
    """`begins_BT` is true where a document begins."""
    rows, length = begins_BT.shape
    begins = begins_BT.copy()
    begins[:, 0] = True
    borders = numpy.append(numpy.flatnonzero(begins), rows * length)
    lengths = numpy.diff(borders)
    positions = numpy.arange(rows * length) - numpy.repeat(borders[:-1], lengths)
    return Packing(
        torch.from_numpy(positions.reshape(rows, length)),
        torch.from_numpy(borders.astype(numpy.int32)),
        tuple(lengths.tolist()),
    )


def joined(packings: list[Packing]) -> Packing:
    """As one batch of all their rows; the device is not read."""
    tokens = [packing.positions_BT.numel() for packing in packings]
    firsts = [0, *itertools.accumulate(tokens)][:-1]
    borders = [packing.borders[:-1] + first for packing, first in zip(packings, firsts, strict=True)]
    return Packing(
        torch.cat([packing.positions_BT for packing in packings]),
        torch.cat([*borders, packings[-1].borders[-1:] + firsts[-1]]),
        tuple(length for packing in packings for length in packing.lengths),
    )


def joined_shares(shares: list[Share]) -> Share:
    return shares[0]._replace(positions_BT=torch.cat([share.positions_BT for share in shares]))


@functools.lru_cache(maxsize=4)
def whole_rows(rows: int, length: int, device: torch.device) -> Packing:
    """Each row is one document. A layer with a window uses this if documents are not kept apart."""
    positions = torch.arange(length, device=device).expand(rows, length)
    borders = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    return Packing(positions, borders, (length,) * rows)
