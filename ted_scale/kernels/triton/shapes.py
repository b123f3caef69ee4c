"""The shape of each kernel: block sizes, warps and pipeline stages. It is the same on every device and for every operand type.

They are chosen so that no kernel spills registers on any target. tools/bench/compile_report.py compiles every kernel and writes
the table in docs/kernels.md. If measurements show a faster shape, this is the only place to change.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1

    @property
    def launch(self) -> dict[str, int]:
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


SHAPES = {
    "rows": Shape({"BLOCK": 4096}, 16),
    "rows_jsd": Shape({"BLOCK": 2048}, 16),  # keeps both softmaxes and their mean
    "layers": Shape({"BLOCK": 2048}, 8),
    "statistics": Shape({"ROWS": 1, "BLOCK": 1024}, 4),  # strict mode: ROWS rows for each program
    "slopes": Shape({"ROWS": 1, "BLOCK": 1024}, 4),
}
