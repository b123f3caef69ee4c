"""The trainer as a user starts it: `deepspeed launch/pretrain.py` on two CPU ranks, killed, resumed, and refused."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import free_port
from places import ROOT
from tiny import make_corpus, make_model, make_run, pretrain, pretrain_command, write_run

from ted_scale.base.errors import Preempted
from ted_scale.ranks.signals import ranks_below

# Steps of many micro-steps: a signal at a step must come before the next but one.
TRAIN = {"steps": 10, "tokens_per_step": 2048}
SETTINGS = {"filters": {"steps": 4}, "train": TRAIN, "checkpoint": {"every": 2}, "wandb": {"project": "tiny"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    make_model(folder / "teacher", "llama", hidden_size=48)
    make_model(folder / "student", "gpt2", num_hidden_layers=2, seed=1)
    make_corpus(folder / "corpus")
    return folder


def steps_of(run) -> list[int]:
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss/total" in row]


def at_step(process, run, step: int) -> list[int]:
    """The ranks, when `step` is in the metrics."""
    metrics, deadline = run.folder / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return ranks_below(process.pid)


def gone(pids, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_supervised_run_goes_on_by_itself_after_a_kill_and_after_a_signal(root):
    """One rank is killed -9 in the first life, one is told to stop in the second, the third comes to the end. That all numbers
    are those of an undisturbed run is in test_faults.py and test_distributed.py."""
    unlucky = make_run(root, name="unlucky", **SETTINGS, limits={"silence_s": 8.0})
    config = write_run(root / "unlucky.toml", unlucky)
    supervise = [
        sys.executable,
        str(ROOT / "launch" / "supervise.py"),
        "--pause-s",
        "0.1",
    ]
    with (root / "said").open("w") as said:
        command = [*supervise, "--", *pretrain_command("--config", config, ranks=2)]
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    first = at_step(process, unlucky, 9)
    os.kill(first[1], signal.SIGKILL)
    assert gone(first, 60)
    before = json.loads((unlucky.folder / "checkpoints" / "step_00000008" / "progress.json").read_text())
    os.kill(at_step(process, unlucky, 11)[1], signal.SIGUSR1)
    assert process.wait(300) == 0
    assert steps_of(unlucky) == list(range(1, 15))

    said = (root / "said").read_text()
    assert "error: rank 1 must send a heartbeat at least every limits.silence_s (8 s)" in said
    starts = [line for line in said.splitlines() if line.startswith("supervise: ")]
    assert len(starts) == 3 and "restarting in 0 s" in starts[1] and "exit code 75" in starts[1]
    resumed = int(re.findall(r"resuming from .*step_(\d+)", said)[-1])
    assert resumed >= 11, "the step that was signalled was saved"
    assert said.count(f"\nstopped: {Preempted.SENTENCE}") == 1 and "Traceback" not in said

    assert "built successfully" not in said and said.count("Setting accelerator to CPU") <= 2 * len(
        starts
    )  # the launcher's two
    ours = [line for line in said.splitlines() if line and not line.startswith(("[", "supervise: "))]
    assert re.search(r"held-out loss \S+ before, \S+ after, the teacher's \S+$", ours[-2])
    assert ours[-1].endswith(f"is at step 14; next: ted-scale export {unlucky.folder}")
    assert re.search(r"step 14 of 14 \(student\)  loss .* tokens/s, .* a step", said)

    killed, stopped = [line for line in said.splitlines() if "the run was down for" in line]
    assert "after step 8 (" in killed and "its end: error: rank 1 must send a heartbeat" in killed
    assert killed.endswith("start the same command again (exit code 5)")
    assert "no step must be taken again; its end: stopped: asked to stop" in stopped
    assert re.search(r"at step 8 and [1-9] steps that are not saved; restarting", starts[0])
    rows = [json.loads(line) for line in (unlucky.folder / "metrics.jsonl").read_text().splitlines()]
    costs = [row for row in rows if "perf/restart_lost_steps" in row]
    assert costs[0]["step"] == 9 and costs[0]["perf/restart_lost_steps"] >= 1 == 1 + costs[1]["perf/restart_lost_steps"]
    assert min(costs[0]["perf/restart_lost_min"], costs[1]["perf/restart_down_min"]) > 0
    last = [row for row in rows if "perf/goodput" in row][-1]
    shares = {key: share for key, share in last.items() if key == "perf/goodput" or key.startswith("perf/lost_")}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    assert shares["perf/lost_start"] > shares["perf/goodput"] > 0  # two minutes of imports, a second of steps

    after = json.loads((unlucky.folder / "checkpoints" / "step_00000014" / "progress.json").read_text())
    assert before["wandb_id"] == after["wandb_id"] is not None
    assert len(list((unlucky.folder / "wandb").glob("offline-run-*"))) == 3
    left = sorted(p.name for p in (unlucky.folder / "checkpoints").iterdir())
    assert left == ["step_00000012", "step_00000014"]

    again = pretrain("--config", config, "--set", "seed=7")
    assert again.returncode == 2
    assert "step_00000014, seed must be 0, but is 7; " in again.stderr
    assert "Traceback" not in again.stderr + again.stdout


def test_a_mistake_is_one_sentence_and_exit_code_2_through_the_launcher(root):
    done = pretrain("--config", write_run(root / "x.toml", make_run(root, name="x")), "--set", "loss.kll=1.0", ranks=2)
    assert done.returncode == 2
    assert (done.stderr + done.stdout).count("unknown key loss.kll; did you mean loss.kl?") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert not (root / "runs" / "x").exists()


def test_a_backend_that_the_device_has_not_is_refused_and_the_chosen_one_is_in_the_log(root):
    config = write_run(root / "backend.toml", make_run(root, name="backend", **SETTINGS))
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = pretrain("--config", config, "--set", "loss.backend='triton'", env=env)
    assert done.returncode == 2
    assert "loss.backend must be auto, torch or compiled on cpu, but is 'triton'" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    log = (root / "runs" / "unlucky" / "log.txt").read_text()
    assert log.count("losses: torch kernels on cpu (auto)") == 3  # lives


def test_a_run_folder_that_another_run_is_in_is_refused_and_left_alone(root):
    run = make_run(root, name="taken")
    (run.folder / "checkpoints").mkdir(parents=True)
    with (run.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done = pretrain("--config", write_run(root / "taken.toml", run))
    said = (
        f"runs must be used by one process at a time, but another process is using {run.folder}; wait for it, or give "
    )
    assert done.returncode == 5  # a lost node's lock goes by itself
    assert (done.stderr + done.stdout).count(f"error: {said}this run another name\n") == 1
    assert sorted(p.name for p in run.folder.iterdir()) == [".lock", "checkpoints"]


def test_a_run_folder_that_nodes_do_not_share_is_refused_on_every_node(root, tmp_path):
    """Two nodes on one machine: each has its own working directory, and `runs` is relative to it."""
    config = write_run(tmp_path / "nodes.toml", make_run(root, name="nodes", runs="runs"))
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    script = str(ROOT / "launch" / "pretrain.py")
    nodes, port = [], free_port()
    for rank in (0, 1):
        home = tmp_path / f"node{rank}"
        home.mkdir()
        command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(tmp_path / "hosts"), "--no_ssh"]
        command += ["--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port]
        nodes.append(
            subprocess.Popen(
                [*command, script, "--config", str(config)],
                cwd=home,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [node.communicate(timeout=150)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    assert "runs must be a folder that all nodes share, but rank 1 sees another runs/nodes" in said[0]
    assert not any("Traceback" in text for text in said)
