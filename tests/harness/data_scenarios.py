"""Scenarios of ranks.py about what a run reads: an adaptive blend over three kinds of text, a run that goes on with other data
settings, and rows of whole examples."""

import shutil
from pathlib import Path

import numpy
import torch.distributed as dist
from corpus import write_masked
from scenarios import put_back, start
from tiny import VOCABULARY

from ted_scale.base.errors import UserError

DOMAINS = ("prose", "code", "reference")
ADAPTIVE = {
    "filters": {"steps": 2}, "train": {"steps": 10}, "checkpoint": {"every": 1, "keep": 100},
    "validation": {"tokens": 1536},
}  # fmt: skip


def corpora(folder: Path, **weights) -> list[dict]:
    weight = {name: weights.get(name, 1.0) for name in DOMAINS}
    return [{"path": str(folder / name), "validation": 0.2, "weight": weight[name]} for name in DOMAINS]


def make_examples(folder: Path) -> None:
    """60 examples, of which a random half of the tokens are targets."""
    rng = numpy.random.default_rng(0)
    documents = [rng.integers(3, VOCABULARY, rng.integers(8, 30)).tolist() for _ in range(60)]
    write_masked(folder / "examples", documents, [rng.integers(0, 2, len(each)).tolist() for each in documents])


def every_token(folder: Path, device):
    """TED on packed examples whose prompts the teacher teaches, too: ranks count unlike numbers of targets and of tokens."""
    data = {"corpora": [{"path": str(folder / "examples")}], "packing": "examples", "attention": "document"}
    name = f"every_token_{dist.get_world_size()}"
    start(folder, device, name=name, data=data, loss={"tokens": "all"}, filters={"steps": 1}, train={"steps": 3})


def again_from(folder: Path, name: str, step: int, copy: str) -> None:
    """Rank 0 copies a run's folder and puts it back to the checkpoint of `step`."""
    if dist.get_rank() == 0:
        target = folder / "runs" / copy
        shutil.copytree(folder / "runs" / name, target)
        put_back(target, step)
    dist.barrier()


def adaptive(folder: Path, device):
    """Twelve steps straight, measured at 2, 6 and 10; then again from the checkpoints of 6, where it is measured, and of 8."""
    settings = {"data": {"blend": {"kind": "adaptive", "every": 4}, "corpora": corpora(folder, code=2.0)}, **ADAPTIVE}
    start(folder, device, name="adaptive", **settings)
    for step in (6, 8):
        again_from(folder, "adaptive", step, f"adaptive_from_{step}")
        start(folder, device, name=f"adaptive_from_{step}", **settings)


def other_data(folder: Path, device):
    """A kd run of 6 steps that goes on to 10 with half the seq_len, twice the step and other weights."""
    first = {"method": "kd", "data": {"corpora": corpora(folder)}, "train": {"steps": 6}, "name": "other_data"}
    start(folder, device, **first)
    then = {
        **first, "data": {"corpora": corpora(folder, prose=0.0, code=3.0), "seq_len": 16},
        "train": {"steps": 10, "tokens_per_step": 512},
    }  # fmt: skip
    start(folder, device, **then)


def runs_out(folder: Path, device):
    """`short` must not repeat and holds enough for the first stretch of an adaptive blend, not for the second."""
    short = {"path": str(folder / "short"), "validation": 0.2, "weight": 1.0, "repeat": False}
    data = {"blend": {"kind": "adaptive", "every": 3}, "corpora": [*corpora(folder)[:1], short]}
    try:
        start(folder, device, name="runs_out", method="kd", data=data, train={"steps": 9})
    except UserError as error:
        return str(error)


def packed_resumes(folder: Path, device):
    """Six steps over packed examples with targets, straight on two ranks; then from the checkpoint of step 3 on two, and on one."""
    ranks, path = dist.get_world_size(), folder / "packed_examples"
    settings = {
        "method": "ce", "data": {"packing": "examples", "attention": "document", "corpora": [{"path": str(path)}]},
        "checkpoint": {"every": 3, "keep": 100},
    }  # fmt: skip
    if ranks == 2:
        if dist.get_rank() == 0:
            lengths = numpy.random.default_rng(0).integers(3, 40, 60).tolist()
            documents = [[1 + (7 * d + i) % 127 for i in range(n)] for d, n in enumerate(lengths)]
            write_masked(path, documents, [[int(3 * i > n) for i in range(n)] for n in lengths])
        dist.barrier()
        start(folder, device, name="packed", **settings)
    again_from(folder, "packed", 3, f"packed_from_3_on_{ranks}")
    start(folder, device, name=f"packed_from_3_on_{ranks}", **settings)
