"""A long one: a network so slow that the place of the teacher matters, and whether a plan knew by how much.

Two nodes of one rank, joined at a rate that the kernel holds them to. The plan has calibrated on both of them, over that network.
"""

import json

import pytest
import soak_report
from network import ADDRESSES, DEEPSPEED, two_nodes, write_hosts
from places import HARNESS
from tiny import make_corpus, make_model, make_run, write_run

pytestmark = pytest.mark.soak

STUDENT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3}
TEACHER = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
RANKS, MICRO_STEPS, ROUNDS = 2, 2, 9
SHARE = 0.8  # of the gain that is planned


@pytest.mark.parametrize("megabits", [1000, 100])
def test_a_teacher_that_crosses_no_slow_network_gains_what_the_plan_says(tmp_path, megabits):
    for name, sizes in (("teacher", TEACHER), ("student", STUDENT)):
        make_model(tmp_path / name, "llama", initializer_range=0.02, **sizes)
    weights = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("teacher", "student")]
    assert weights[0] >= 8 * weights[1]
    make_corpus(tmp_path / "corpus")
    train = {"steps": 1000, "tokens_per_step": RANKS * 32 * MICRO_STEPS}
    config = write_run(tmp_path / "run.toml", make_run(tmp_path, method="kd", filters={"steps": 0}, train=train))
    found = measured(tmp_path, config, megabits)
    said = {key: round(value, 1) if isinstance(value, float) else rounded(value) for key, value in found.items()}
    soak_report.note("nodes", f"{megabits} Mbit/s", **said)
    sharded = found["sharded"]
    for each in (found["node"], found["replicated"]):
        gain, planned = (sharded[key] / each[key] for key in ("ms", "planned_ms"))
        assert gain > 1 and gain >= SHARE * planned, said
        assert all(0.98 < way["mib"] / way["planned_mib"] < 1.1 for way in (sharded, each)), said


def measured(folder, config, megabits: int) -> dict:
    hosts, said, out = write_hosts(folder, ADDRESSES), folder / "said", folder / "found.json"
    with two_nodes(folder, shaped=True) as nodes, said.open("w") as file:
        nodes.slow(megabits)
        words = (HARNESS / "places_in_turn.py", config, out, ROUNDS)
        process = nodes.start(0, DEEPSPEED, "--hostfile", hosts, *words, said=file, cwd=folder)
        assert process.wait(1800) == 0, said.read_text()[-3000:]
    return json.loads(out.read_text())


def rounded(way: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 1) for key, value in way.items()}
