"""A run on two nodes, each a network namespace with its own address; tests/test_soak_nodes.py has what takes longer."""

import json
import time

from network import ADDRESSES, DEEPSPEED, NOBODY, PRETRAIN, SUPERVISE, two_nodes, write_hosts
from tiny import make_corpus, make_model, make_run, write_run

TRAIN = {"steps": 3, "tokens_per_step": 64}
SECTIONS = {"method": "kd", "filters": {"steps": 0}, "train": TRAIN, "checkpoint": {"every": 100}}


def test_a_hostfile_starts_a_rank_on_each_node_and_they_train_over_the_network(tmp_path):
    """`deepspeed` on the first node, as the README says; what ranks need to know about the network is in .deepspeed_env."""
    make_model(tmp_path / "teacher", "llama")
    make_model(tmp_path / "student", "llama", num_hidden_layers=2)
    make_corpus(tmp_path / "corpus")
    config = write_run(tmp_path / "run.toml", make_run(tmp_path, **SECTIONS))
    with two_nodes(tmp_path) as nodes, (tmp_path / "said").open("w") as said:
        hosts = write_hosts(tmp_path, ADDRESSES)
        process = nodes.start(0, DEEPSPEED, "--hostfile", hosts, PRETRAIN, "--config", config, said=said, cwd=tmp_path)
        assert process.wait(300) == 0, (tmp_path / "said").read_text()[-3000:]
        assert min(nodes.received(node) for node in (0, 1)) > 3 * 50_000  # steps times half of the teacher's weights
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/total" in row] == [1, 2, 3]
    assert "2 ranks" in (tmp_path / "runs/tiny/log.txt").read_text()


def test_a_host_that_ssh_does_not_reach_is_a_mistake_within_seconds(tmp_path):
    """Neither models nor corpora are there: nothing looks for them before the hosts."""
    config = write_run(tmp_path / "run.toml", make_run(tmp_path))
    with two_nodes(tmp_path) as nodes, (tmp_path / "said").open("w") as said:
        hosts, began = write_hosts(tmp_path, [ADDRESSES[0], NOBODY]), time.monotonic()
        command = [DEEPSPEED, "--hostfile", hosts, PRETRAIN, "--config", config]
        assert nodes.start(0, *SUPERVISE, "--", *command, said=said, cwd=tmp_path).wait(60) == 2
        assert time.monotonic() - began < 30
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"error: --hostfile must name machines that ssh reaches, but {NOBODY} is not (")
    assert "No route to host" in said and ADDRESSES[0] not in said and said.count("\n") == 1
