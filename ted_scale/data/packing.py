"""The positions of documents in a batch. They are computed once on the host, so that no forward waits for the device.

The rows of a batch count as one line of B * T tokens. The start of a row is always a border, because the row before it is another
sample. Note: positions also begin at 0 in a window that begins within a document, and in a piece that follows another piece:
attention sees nothing before them.
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
    """The tokens that a rank has of rows that several ranks share: each row is cut into `of` equal pieces, and this is piece
    `index`. A packing beside a share describes the whole rows."""

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
    """The packing of one batch with all their rows. The device is not read."""
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
    """A packing in which each row is one document. A layer with a window uses it if documents are not kept apart."""
    positions = torch.arange(length, device=device).expand(rows, length)
    borders = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    return Packing(positions, borders, (length,) * rows)
