"""ted-scale supervise: what it restarts, when, how often, to whom it forwards signals, and that no process is left."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import HARNESS, ROOT
from tiny import make_run, write_run

from ted_scale.base.errors import MEANINGS, UserError
from ted_scale.commands import supervise
from ted_scale.commands.supervise import Exits, pause_after, run_file_of

SCRIPT = HARNESS / "supervised.py"
SETTINGS = argparse.Namespace(attempts=5, pause_s=10.0, longest_pause_s=600.0)


def start(folder: Path, lives: str, *options) -> subprocess.Popen:
    (folder / "lives").write_text(lives.replace(",", "\n"))
    config = write_run(folder / "run.toml", make_run(folder))
    command = [sys.executable, str(SCRIPT), str(folder), str(config), "--pause-s", "0.2", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=30)[1]
    assert "Traceback" not in said, said
    return said


def wait_for_ranks(folder: Path) -> None:
    """Wait until both ranks have started."""
    end = time.monotonic() + 20
    while not (folder / "pids").exists() or (folder / "pids").read_text().count("\n") < 2:
        assert time.monotonic() < end
        time.sleep(0.02)


def no_process_is_left(folder: Path) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in (folder / "pids").read_text().split())


def test_a_failure_restarts_after_a_pause_a_stop_at_once_and_done_never(tmp_path):
    process = start(tmp_path, "1 3,1 3,75 5,247 6,0 9")
    said = finished(process)
    assert process.returncode == 0
    first, second, third, fourth, fifth = map(float, (tmp_path / "started").read_text().split())
    assert second - first >= 0.15 and third - second >= 0.3 and fifth - fourth >= 0.15
    assert (
        "exit code 75 (asked to stop, nothing is lost; the same command goes on) at step 5; restarting in 0 s" in said
    )
    assert "exit code 247 (ended by a signal, or by its launcher) at step 6" in said


@pytest.mark.parametrize("code", [2, 3, 6])
def test_exit_codes_that_a_restart_cannot_help_are_not_restarted(tmp_path, code):
    process = start(tmp_path, f"{code} 3,0 9")
    finished(process)
    assert process.returncode == code
    assert (tmp_path / "started").read_text().count("\n") == 1


def test_it_gives_up_without_a_newer_checkpoint(tmp_path):
    process = start(tmp_path, "1 3,5 4,4 4,75 4,0 9", "--attempts", "3")
    said = finished(process)
    assert process.returncode == 75
    assert "at step 4; gave up after 3 exits without a newer checkpoint" in said


def test_exit_code_0_before_the_last_step_counts_as_a_killed_launcher(tmp_path):
    process = start(tmp_path, "0 3,0 9")
    assert "the command exited with 0 before the last step" in finished(process)
    assert process.returncode == 0


@pytest.mark.parametrize(("sent", "heard"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGTERM")])
def test_a_signal_is_forwarded_to_the_ranks_and_nothing_is_restarted(tmp_path, sent, heard):
    process = start(tmp_path, "wait 4,0 9")
    wait_for_ranks(tmp_path)
    process.send_signal(signal.Signals[sent])
    finished(process)
    assert process.returncode == 75
    assert (tmp_path / "heard").read_text() == f"{heard}\n" * 2
    assert (tmp_path / "started").read_text().count("\n") == 1 and no_process_is_left(tmp_path)


def test_ranks_that_ignore_signals_are_killed_after_the_patience(tmp_path):
    process = start(tmp_path, "stubborn 4,0 9", "--patience-s", "0.5")
    wait_for_ranks(tmp_path)
    process.send_signal(signal.SIGTERM)
    finished(process)
    assert process.returncode == 128 + signal.SIGKILL
    assert no_process_is_left(tmp_path)


def test_ranks_without_a_launcher_may_save_before_the_restart(tmp_path):
    process = start(tmp_path, "orphans 4,0 9")
    said = finished(process)
    assert process.returncode == 0
    assert "exit code 75" in said  # theirs
    first, second = map(float, (tmp_path / "started").read_text().split())
    assert second - first > 1.0  # the ranks' time
    assert no_process_is_left(tmp_path)


def test_a_signal_during_a_pause_ends_the_supervisor(tmp_path):
    process = start(tmp_path, "1 4,0 9", "--pause-s", "60")
    assert any("restarting in" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    finished(process)
    assert process.returncode == 75
    assert (tmp_path / "started").read_text().count("\n") == 1


def test_a_signal_while_ssh_is_asked_for_the_hosts_ends_the_supervisor(tmp_path):
    """Ctrl-C, which a terminal sends to the whole group. The command is not there: nobody starts it."""
    ssh, asked = tmp_path / "ssh", tmp_path / "asked"
    ssh.write_text(f"#!/bin/sh\necho $$ > {asked}.part && mv {asked}.part {asked}\nexec sleep 300\n")
    ssh.chmod(0o700)
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    config = write_run(tmp_path / "run.toml", make_run(tmp_path))
    command = ["deepspeed", "--hostfile", tmp_path / "hosts", "a.py", "--config", config]
    process = subprocess.Popen(
        [sys.executable, ROOT / "launch" / "supervise.py", "--", *command],
        **{"stderr": subprocess.PIPE, "text": True, "start_new_session": True},
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    while not asked.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert finished(process) == ""
    assert process.returncode == 75
    assert not Path(f"/proc/{asked.read_text().strip()}").exists()


def test_a_signal_while_ssh_is_asked_again_ends_the_supervisor(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    command = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "a.py"]
    monkeypatch.setattr(supervise.hosts, "PROBE", ("true",))
    assert supervise.still_reached(command, SETTINGS) == command
    monkeypatch.setattr(supervise, "received", [signal.SIGTERM])
    assert supervise.still_reached(command, SETTINGS) is None


SIGNALLED_AT_ONCE = """
import os, signal
from ted_scale.commands import supervise

def spawn(command):
    supervise.received.append(signal.SIGTERM)
    return os.posix_spawn(command[0], command, os.environ)

supervise.spawn = spawn
print(supervise.run_once(["/bin/sleep", "30"], 60))
"""


def test_a_signal_during_the_start_of_the_command_is_forwarded():
    """In a process of its own, because it kills all its children; here W&B's service would be one."""
    began = time.monotonic()
    command = [sys.executable, "-c", SIGNALLED_AT_ONCE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert int(done.stdout) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 10


def test_pauses_double_up_to_the_longest_and_vary():
    assert [pause_after(1, exits, SETTINGS, 0.5) for exits in (1, 2, 3, 9)] == [10, 20, 40, 600]
    assert (pause_after(5, 1, SETTINGS, 0.0), pause_after(5, 1, SETTINGS, 1.0)) == (7.5, 12.5)
    assert pause_after(75, 4, SETTINGS, 0.5) == 0


def test_the_docs_list_every_exit_code_with_its_meaning():
    table = (ROOT / "docs" / "operations.md").read_text()
    for code, meaning in MEANINGS.items():
        assert f"| {code} | {meaning} |" in table


def test_exits_are_counted_at_a_step():
    exits, counts = Exits(), []
    for step in (0, 0, 4, 4, 4, 8):
        exits = exits.after(step)
        counts.append(exits.count)
    assert counts == [1, 2, 1, 2, 3, 1]


def test_the_run_file_is_read_from_the_command():
    words = [
        "deepspeed",
        "--num_gpus",
        "2",
        "launch/pretrain.py",
        "--config=a.toml",
        "--set",
        "seed=1",
        "--set",
        "loss.kl=0.5",
    ]
    assert run_file_of(words) == ("a.toml", ["seed=1", "loss.kl=0.5"])
    with pytest.raises(UserError, match="the command must name its run file by --config"):
        run_file_of(["sleep", "1"])
