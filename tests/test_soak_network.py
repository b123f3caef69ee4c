"""A long one: a network so slow that the place of the teacher matters, and whether a plan knew by how much.

Two nodes of one rank, joined at a rate that the kernel holds them to. The plan has calibrated on both of them, over that network.
"""

import json
import statistics
import subprocess

import pytest
import soak_report
from network import ADDRESSES, DEEPSPEED, PRETRAIN, Nodes, two_nodes, write_hosts
from places import ROOT
from tiny import make_corpus, make_model, make_run, write_run

pytestmark = pytest.mark.soak

STUDENT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3}
TEACHER = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
WAYS = {"sharded": {"placement": "sharded"}, "replicated": {"placement": "replicated"},
        "node": {"placement": "node", "node_ranks": 1}}  # fmt: skip
STEPS, MICRO_STEPS, WARM_UP = 10, 4, 3
TRAIN = {"steps": STEPS, "tokens_per_step": 2 * 32 * MICRO_STEPS}
SHARE = 0.8  # of the gain that is planned


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in (("teacher", TEACHER), ("student", STUDENT)):
        make_model(folder / name, "llama", initializer_range=0.02, **sizes)
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("teacher", "student")]
    assert sizes[0] >= 8 * sizes[1]
    make_corpus(folder / "corpus")
    return folder


def launched(nodes: Nodes, folder, *words) -> None:
    hosts, said = write_hosts(folder, ADDRESSES), folder / "said"
    with said.open("w") as out:
        process = nodes.start(0, DEEPSPEED, "--hostfile", hosts, *words, said=out, cwd=folder)
        try:
            assert process.wait(900) == 0, said.read_text()[-3000:]
        except subprocess.TimeoutExpired:
            pytest.fail(said.read_text()[-3000:])


def trained(nodes: Nodes, models, folder, name: str) -> dict[str, float]:
    """Milliseconds of a step: as measured, and as planned. Mebibytes that a node received in a step."""
    sections = {
        "method": "kd",
        "filters": {"steps": 0},
        "train": TRAIN,
        "checkpoint": {"every": 100},
        "validation": {"tokens": 64},
    }
    run = make_run(models, name=name, runs=str(folder / "runs"), **sections, teacher=WAYS[name])
    before = nodes.received(1)
    launched(nodes, folder, PRETRAIN, "--config", write_run(folder / f"{name}.toml", run))
    received = (nodes.received(1) - before) / STEPS / 2**20
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "perf/step_ms" in row][WARM_UP:]
    measured = statistics.median(row["perf/step_ms"] for row in steps)
    return {"measured": measured, "planned": steps[-1]["perf/forecast_ms"], "received": received}


@pytest.mark.parametrize("megabits", [1000, 100])
def test_a_teacher_that_crosses_no_slow_network_gains_what_the_plan_says(models, tmp_path, megabits):
    with two_nodes(tmp_path, shaped=True) as nodes:
        nodes.slow(megabits)
        plan = write_run(
            tmp_path / "plan.toml",
            make_run(models, runs=str(tmp_path / "runs"), method="kd", train=TRAIN, filters={"steps": 0}),
        )
        launched(nodes, tmp_path, ROOT / "tools" / "plan.py", plan, "--calibrate", "--minutes", "0.5")
        found = {name: trained(nodes, models, tmp_path, name) for name in WAYS}
    link = json.loads((tmp_path / "runs" / "machine.json").read_text())["far_link"] * 8 / 1e6
    said = {name: {key: round(value, 1) for key, value in each.items()} for name, each in found.items()}
    soak_report.note("nodes", f"{megabits} Mbit/s", link=round(link), **said)
    sharded = found.pop("sharded")
    for name, each in found.items():
        gain, planned = (sharded[key] / each[key] for key in ("measured", "planned"))
        assert gain > 1 and gain >= SHARE * planned, (name, gain, planned, said)
