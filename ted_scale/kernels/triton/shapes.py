"""The tile shapes of each kernel, by architecture and operand type.

They are chosen so that nothing spills on its target: tools/bench/compile_report.py compiles every one of them and writes
the table in docs/kernels.md. Where measured speed asks for another shape, this is the only place to change it.
"""

from typing import NamedTuple

import torch

from ted_scale.kernels.triton.device import architecture


class Shape(NamedTuple):
    """Block sizes, warps and pipeline stages. `descriptors`: Hopper's copy engine loads the tiles. It needs rows of a
    multiple of 16 bytes; for other rows `plain` is used."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    descriptors: bool = False
    plain: "Shape | None" = None

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tile(m: int, n: int, k: int, warps: int, stages: int, **options) -> Shape:
    return Shape({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages, **options)


# fp32 operands: exact products, without tensor cores. ptxas spills a little to fit more blocks on a multiprocessor. Where it
# does so depends on the target, so a target may have its own shape, "fp32 <target>".
ROWS = {"any": Shape({"BLOCK": 4096}, 16, 1)}
LAYERS = {"any": Shape({"BLOCK": 2048}, 8, 1)}
STATISTICS = {
    "fp32": tile(64, 64, 64, 8, 1),
    "fp32 sm_100": tile(64, 64, 64, 8, 2),
    "sm_80": tile(64, 128, 64, 8, 3),
    "sm_90": tile(128, 64, 64, 8, 4, descriptors=True, plain=tile(64, 128, 64, 8, 3)),
    "sm_100": tile(128, 64, 64, 8, 3, descriptors=True, plain=tile(128, 64, 64, 8, 3)),
    "gfx942": tile(128, 128, 64, 8, 2),
}
SLOPES = {
    "fp32": tile(64, 64, 32, 8, 2),
    "sm_80": tile(64, 128, 64, 8, 3),
    "sm_90": tile(128, 64, 64, 8, 4, descriptors=True, plain=tile(128, 64, 64, 8, 3)),
    "sm_100": tile(128, 64, 64, 8, 4, descriptors=True, plain=tile(128, 64, 64, 8, 3)),
    "gfx942": tile(128, 128, 64, 8, 2),
}
TABLES = {"rows": ROWS, "layers": LAYERS, "statistics": STATISTICS, "slopes": SLOPES}


def pick(table: dict[str, Shape], *operands) -> Shape:
    """The shape for these operands, on their device."""
    exact = any(x.dtype == torch.float32 for x in operands)
    shape = shape_for(table, family(architecture(operands[0].device)), exact)
    return shape if not shape.descriptors or all(map(aligned, operands)) else shape.plain


def shape_for(table: dict[str, Shape], target: str, exact: bool) -> Shape:
    if "any" in table:
        return table["any"]
    return table.get(f"fp32 {target}", table["fp32"]) if exact else table[target]


def family(name: str) -> str:
    """The architecture whose shapes `name` uses: consumer cards have sm_80's shared memory or more."""
    if name.startswith("gfx"):
        return "gfx942"
    return name if name in ("sm_90", "sm_100") else {"sm_103": "sm_100"}.get(name, "sm_80")


def aligned(tensor) -> bool:
    """Whether the copy engine can read the tensor."""
    size = tensor.element_size()
    return tensor.stride(-1) == 1 and tensor.stride(0) * size % 16 == 0 and tensor.data_ptr() % 16 == 0
