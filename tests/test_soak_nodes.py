"""Long ones: two nodes, of which one is cut off in the middle of a step or told to stop, and a network so slow that it matters."""

import json
import os
import re
import signal
import sys
import time

import pytest
from network import ADDRESSES, DEEPSPEED, PRETRAIN, SUPERVISE, pids_in, two_nodes, write_hosts
from places import ROOT
from tiny import make_corpus, make_model, make_run, write_run

from ted_scale.ranks.signals import words_of

pytestmark = pytest.mark.soak

# Steps of many micro-steps, so that what happens at a step falls into it or the next one.
TRAIN = {"steps": 12, "tokens_per_step": 4096}
SECTIONS = {
    "method": "kd",
    "filters": {"steps": 0},
    "train": TRAIN,
    "checkpoint": {"every": 2},
    "limits": {"silence_s": 8.0},
}
PAUSE = ("--pause-s", "2")


@pytest.fixture
def run(tmp_path):
    make_model(tmp_path / "teacher", "llama", num_hidden_layers=8)
    make_model(tmp_path / "student", "llama", num_hidden_layers=2)
    make_corpus(tmp_path / "corpus")
    run = make_run(tmp_path, **SECTIONS)
    write_run(tmp_path / "run.toml", run)
    return run


def rows_of(run) -> list[dict]:
    metrics = run.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return [row for row in rows if "loss/total" in row]


def until(condition, process, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)


def ranks_in(space: str) -> list[int]:
    return [pid for pid in pids_in(space) if any(word.startswith("--local_rank") for word in words_of_pid(pid))]


def words_of_pid(pid: int) -> list[str]:
    import psutil

    return words_of(psutil.Process(pid)) if psutil.pid_exists(pid) else []


def is_alive(run, step: int) -> bool:
    return any(row["step"] >= step for row in rows_of(run))


def is_whole(run) -> bool:
    """Every step is there once: what a restart takes again replaces what was not saved."""
    return [row["step"] for row in rows_of(run)] == list(range(1, TRAIN["steps"] + 1))


@pytest.mark.parametrize("told", ["leave", "wait"])
def test_a_node_is_cut_off_in_a_step_and_the_run_goes_on_without_it_or_waits_as_told(tmp_path, run, told):
    hosts, said = write_hosts(tmp_path, ADDRESSES), tmp_path / "said"
    with two_nodes(tmp_path) as nodes, said.open("w") as out:
        command = [DEEPSPEED, "--hostfile", hosts, PRETRAIN, "--config", tmp_path / "run.toml"]
        supervised = [*SUPERVISE, *PAUSE, "--lost-hosts", told, "--", *command]
        process = nodes.start(0, *supervised, said=out, cwd=tmp_path)
        until(lambda: is_alive(run, 5), process)
        nodes.cut(1)
        if told == "wait":
            until(lambda: f"waiting for hosts that ssh must reach: {ADDRESSES[1]}" in said.read_text(), process)
            assert not ranks_in(nodes.spaces[0]), "nothing is started meanwhile"
            nodes.join(1)
        assert process.wait(240) == 0, said.read_text()[-3000:]
        until(lambda: not ranks_in(nodes.spaces[1]), Endless(), 60)
    assert is_whole(run)
    assert "rank 1 must send a heartbeat at least every limits.silence_s (8 s)" in said.read_text()
    lives = re.findall(r"(\d+) ranks?, folder", (run.folder / "log.txt").read_text())
    assert lives == ["2", "1" if told == "leave" else "2"]


class Endless:
    """For `until`, where no process of ours must live."""

    def poll(self) -> None:
        return None


def test_nodes_that_are_started_one_by_one_find_each_other_again(tmp_path, run):
    """--no_ssh: a supervisor on each, which do not talk to each other."""
    hosts, said = write_hosts(tmp_path, ADDRESSES), [tmp_path / f"said{node}" for node in (0, 1)]
    known = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with two_nodes(tmp_path) as nodes, said[0].open("w") as first, said[1].open("w") as second:
        processes = []
        for node, out in enumerate((first, second)):
            where = ["--no_ssh", "--node_rank", node, "--master_addr", ADDRESSES[0]]
            command = [DEEPSPEED, "--hostfile", hosts, *where, PRETRAIN, "--config", tmp_path / "run.toml"]
            processes.append(nodes.start(node, *SUPERVISE, *PAUSE, "--", *command, said=out, cwd=tmp_path, **known))
        until(lambda: is_alive(run, 5), processes[0])
        nodes.cut(1)
        for each in said:
            until(lambda each=each: "restarting in" in each.read_text(), processes[0], 120)
        nodes.join(1)
        assert [process.wait(300) for process in processes] == [0, 0], [each.read_text()[-3000:] for each in said]
    assert is_whole(run)


def test_slurm_s_script_trains_on_two_nodes_and_is_requeued_after_a_signal(tmp_path, run):
    job = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(ROOT)}
    known = {"GLOO_SOCKET_IFNAME": "eth0", "PYTHON": sys.executable, "TRIAL": str(tmp_path), **job}
    script = ("bash", ROOT / "launch" / "slurm" / "pretrain.sbatch", "--config", tmp_path / "run.toml")
    with two_nodes(tmp_path) as nodes, (tmp_path / "said").open("w") as out:
        process = nodes.start(0, *script, said=out, cwd=tmp_path, **known)
        until(lambda: is_alive(run, 3), process)
        ours = [pid for pid in pids_in(nodes.spaces[1]) if "launch/pretrain.py" in words_of_pid(pid)]
        os.kill(ours[0], signal.SIGUSR1)
        assert process.wait(120) == 0
        assert (tmp_path / "requeued").read_text() == "31234\n"
        saved = max(row["step"] for row in rows_of(run))
        again = nodes.start(0, *script, said=out, cwd=tmp_path, **known, SLURM_RESTART_COUNT="1")
        assert again.wait(240) == 0, (tmp_path / "said").read_text()[-3000:]
    assert is_whole(run) and 3 <= saved < TRAIN["steps"]
    said = (tmp_path / "said").read_text()
    assert "=== exit code 75: requeued" in said and "=== exit code 0: not requeued" in said
    assert int(re.findall(r"resuming from .*step_(\d+)", said)[-1]) == saved
