"""A machine in a few numbers: what a rank has, and how fast each kind of operation is there.

A named device is its data sheet times one efficiency for each kind of operation. `ted-scale plan --calibrate` measures the same
numbers and keeps them in RUNS/machine.json, for the precision and the ranks that it ran with. Note: a link's figure is what one
rank receives a second, in one direction.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.durable import write_durably
from ted_scale.base.errors import UserError, files_at, shown
from ted_scale.base.parsing import is_count, parse_json
from ted_scale.metrics.peaks import peak_of

FILE = "machine.json"
WORDS = {"device": ("cuda", "cpu"), "precision": ("bf16", "fp32")}
MAY_BE_0 = ("latency", "overlap")
LARGEST = 1e30


class Machine(NamedTuple):
    """Rates are FLOP/s or bytes/s of one rank."""

    name: str
    device: str  # "cuda" or "cpu"
    memory: float  # bytes of a rank
    peak: float | None  # FLOP/s of the data sheet, for MFU
    products: float  # of matrices with a batch's states
    attention: float
    head: float  # of output projections with their losses, forward and backward
    layer: float  # of filters with the layer loss, forward and backward
    copies: float  # of what element-wise operations read and write
    update: float  # of what an optimizer step reads and writes
    node_link: float
    far_link: float  # between nodes; a rank's share of its node's
    host_link: float  # from the host's memory
    latency: float  # seconds of a collective of two ranks
    call: float  # seconds of the host for one operation
    overlap: float  # the share of a pass's time behind which its communication hides
    source: str
    precision: str  # of the products
    ranks: int  # that measured it together; 0: a data sheet

    def between_nodes(self, bandwidth: float | None) -> "Machine":
        return self._replace(far_link=bandwidth) if bandwidth else self


class Sheet(NamedTuple):
    """Of the vendor: torch's part of its name (for metrics/peaks.py), bytes, bytes/s of its memory, of its link to the others of
    a node in one direction, of its share of a node's network, of its host's bus."""

    torch_name: str
    memory: float
    bandwidth: float
    node_link: float
    far_link: float
    host_link: float


# Data sheets of NVIDIA (A100 80GB SXM, 2021; H100 SXM, 2022; H200, 2024; HGX B200, 2025) and AMD (MI300X, 2023). `far_link` is the
# usual machine of eight with one network card a device: 200 Gbit/s with A100, 400 with the others.
SHEETS = {
    "a100": Sheet("A100", 80e9, 2.039e12, 300e9, 25e9, 32e9),
    "h100": Sheet("H100", 80e9, 3.35e12, 450e9, 50e9, 64e9),
    "h200": Sheet("H200", 141e9, 4.8e12, 450e9, 50e9, 64e9),
    "b200": Sheet("B200", 180e9, 8.0e12, 900e9, 50e9, 64e9),
    "mi300x": Sheet("MI300X", 192e9, 5.3e12, 448e9, 50e9, 64e9),
}
# Shares of the data sheet. products, copies, head: measured on one H100 (docs/benchmarks_gpu.csv: a.machine's product and copy,
# b.kl_ce, which the layer loss is taken to have, too); update: its 31 ms there beside the bytes that step.py counts. attention:
# FlashAttention-2 on an H100 (Shah et al., 2024, arXiv:2407.08608). Links, latency, call and overlap are assumed.
SHARES = {"products": 0.79, "attention": 0.35, "head": 0.51, "copies": 0.90, "update": 0.80, "links": 0.80}
LATENCY, CALL, OVERLAP = 20e-6, 6e-6, 0.8


def named(name: str, precision: str) -> Machine:
    """A device of the table; an unknown one is refused."""
    if name.lower() not in SHEETS:
        raise UserError(
            f"--gpu must be one of {', '.join(SHEETS)}, but is '{name}'; or calibrate the machine and leave it out"
        )
    sheet, of = SHEETS[name.lower()], SHARES
    peak = peak_of(sheet.torch_name, precision)
    return Machine(
        name=name.lower(), device="cuda", memory=sheet.memory, peak=peak, products=of["products"] * peak,
        attention=of["attention"] * peak, head=of["head"] * peak, layer=of["head"] * peak, copies=of["copies"] * sheet.bandwidth,
        update=of["update"] * sheet.bandwidth, node_link=of["links"] * sheet.node_link, far_link=of["links"] * sheet.far_link,
        host_link=of["links"] * sheet.host_link, latency=LATENCY, call=CALL, overlap=OVERLAP, source="data sheet",
        precision=precision, ranks=0,
    )  # fmt: skip


def of_torch_name(name: str, precision: str) -> Machine | None:
    """The table's device that torch calls so."""
    found = next((key for key, sheet in SHEETS.items() if sheet.torch_name in name), None)
    return (
        named(found, precision)
        if found and peak_of(name, precision) == peak_of(SHEETS[found].torch_name, precision)
        else None
    )


def write(path: Path, machine: Machine) -> None:
    with files_at(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(machine._asdict(), indent=1))


def read(path: Path) -> Machine:
    """As `write` left it; a UserError where a value is missing or makes no sense."""
    with files_at(path):
        text = path.read_text(encoding="utf-8")
    try:
        found = Machine(**parse_json(text))
        check(found)
        return found
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} must hold a machine as ted-scale plan --calibrate writes it, but does not ({error}); calibrate again"
        ) from None


def check(machine: Machine) -> None:
    """Raises ValueError at the first value that no calibration writes."""
    for name, value in machine._asdict().items():
        if not is_possible(name, value):
            raise ValueError(f"its {name} is {shown(value)}")


def is_possible(name: str, value) -> bool:
    if name in WORDS:
        return value in WORDS[name]
    if name in ("name", "source"):
        return isinstance(value, str)
    if name == "ranks":
        return is_count(value)
    if value is None:
        return name == "peak"
    return type(value) in (int, float) and 0 <= value < LARGEST and (value > 0 or name in MAY_BE_0)


def unfit(machine: Machine, precision: str, ranks: int) -> str | None:
    """Why a run cannot be forecast with it, as a sentence."""
    if machine.precision != precision:
        return (
            f"train.precision must be that of the calibration ('{machine.precision}'), but is '{precision}'; calibrate again with "
            "this run file"
        )
    if ranks > 1 and machine.ranks == 1:
        return (
            f"--gpus must be 1 with a calibration by one rank, which measured no link, but is {ranks}; calibrate with several "
            "ranks, or name a device with --gpu"
        )
    return None
