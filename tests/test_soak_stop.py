"""Long: 20 SIGTERMs at random moments of one run, and faults of each kind in the real trainer. `make soak` goes on where it was
broken off, and writes docs/soak_stop.md at its end."""

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from places import ROOT
from soak_report import commit
from tiny import make_corpus, make_model, make_run, pretrain_command, write_run

from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import read_progress
from ted_scale.ranks.signals import ranks_below, words_of

pytestmark = pytest.mark.soak
PLACE = ROOT / "runs" / "soak_stop"  # outlives a soak that is broken off; git ignores it
SAID = PLACE / "said"
REPORT = ROOT / "docs" / "soak_stop.md"
SIGNALS, LONGEST_S, STEPS = 20, 8.0, 500
WHOM = ("a rank", "both ranks", "launch.py", "a rank", "deepspeed")
EXPECTED = {"a rank": (75,), "both ranks": (75,), "launch.py": (1, 75), "deepspeed": (-signal.SIGTERM,)}
SETTINGS = {
    "filters": {"steps": 60}, "train": {"steps": STEPS - 60},
    "validation": {"every": 10, "tokens": 1024},
    "checkpoint": {"every": 7, "keep": 3}, "wandb": {"project": "soak"},
}  # fmt: skip


@pytest.fixture(scope="module")
def place():
    known = PLACE / "commit"
    if not known.exists() or known.read_text() != commit():
        shutil.rmtree(PLACE, ignore_errors=True)
        PLACE.mkdir(parents=True)
        make_model(PLACE / "teacher", "llama", hidden_size=48)
        make_model(PLACE / "student", "gpt2", num_hidden_layers=2, seed=1)
        make_corpus(PLACE / "corpus")
        known.write_text(commit())
    return PLACE


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def last_step(folder: Path) -> int:
    """Taken and written down; the row of a step comes after its update."""
    return max((row["step"] for row in rows(folder) if "loss/total" in row), default=0)


def saved_step(folder: Path) -> int:
    newest = files.newest_checkpoint(folder)
    return read_progress(newest).step if newest else 0


def signalled_life(command: list[str], folder: Path, number: int) -> dict:
    """Start, signal somebody at a random moment, and see what is left. A quarter of the moments are in start-up, the others
    after the life's first step."""
    chance = random.Random(f"{commit()} {number}")
    moment, whom = chance.uniform(0, LONGEST_S), WHOM[number % len(WHOM)]
    with SAID.open("w") as said:  # not a pipe: nobody reads while this test waits
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    ranks: list[int] = []
    while len(ranks) < 2:
        time.sleep(0.01)
        ranks = ranks_below(process.pid)
        assert process.poll() is None, SAID.read_text()[-2000:]
    first, in_startup = last_step(folder), number % 4 == 3
    while not in_startup and last_step(folder) <= max(first, saved_step(folder)):
        assert process.poll() is None, SAID.read_text()[-2000:]
        time.sleep(0.01)
    time.sleep(moment)
    below = psutil.Process(process.pid).children(recursive=True)
    launcher = [p.pid for p in below if any("launcher.launch" in word for word in words_of(p))]
    of = {"a rank": [chance.choice(ranks)], "both ranks": ranks, "launch.py": launcher, "deepspeed": [process.pid]}
    before, sent = last_step(folder), time.monotonic()
    for pid in of[whom]:
        os.kill(pid, signal.SIGTERM)
    while any(alive(pid) for pid in ranks):
        assert time.monotonic() < sent + 120
        time.sleep(0.01)
    took = time.monotonic() - sent
    process.wait(60)
    return {
        "signal": number + 1, "to": whom, "in": "start-up" if in_startup else "steps", "after_s": round(moment, 1),
        "ranks_took_s": round(took, 1), "exit_code": process.returncode, "step_before": before, "last_step": last_step(folder),
        "saved": saved_step(folder), "step_ms": round(median_step_ms(folder)), "tracebacks": SAID.read_text().count("Traceback"),
    }  # fmt: skip


def command_of(config: Path) -> list[str]:
    return pretrain_command("--config", config, ranks=2)


def median_step_ms(folder: Path) -> float:
    return statistics.median([row["perf/step_ms"] for row in rows(folder) if "perf/step_ms" in row] or [0.0])


def test_twenty_signals_at_random_moments_lose_no_step_and_change_no_number(place):
    results = place / "results.jsonl"
    straight, stopped = (make_run(place, name=name, **SETTINGS) for name in ("straight", "stopped"))
    if saved_step(straight.folder) < STEPS:
        subprocess.run(command_of(write_run(place / "straight.toml", straight)), check=True)
    command = command_of(write_run(place / "stopped.toml", stopped))
    lives = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for number in range(len(lives), SIGNALS):
        assert saved_step(stopped.folder) < STEPS, "more steps are needed"
        lives.append(signalled_life(command, stopped.folder, number))
        with results.open("a") as file:
            file.write(json.dumps(lives[-1]) + "\n")
    for life in lives:
        assert life["exit_code"] in EXPECTED[life["to"]], life
        unseen_s = 1.5 if life["to"] == "deepspeed" else 0.0  # the ranks look for their launcher every second
        assert life["saved"] == life["last_step"], life
        assert life["last_step"] - life["step_before"] <= 2 + unseen_s * 1000 / max(life["step_ms"], 1), life
        assert life["tracebacks"] == 0 and life["ranks_took_s"] < 30, life
    subprocess.run(command, check=True)
    same = [numbers(straight.folder), numbers(stopped.folder)]
    assert len(same[0]) > STEPS and same[0] == same[1]
    write_report(lives)


def numbers(folder: Path) -> list[dict]:
    """What a run wrote but for what took how long, and for rows of nothing else."""
    clocks = ("perf/", "memory/", "checkpoint/")
    told = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows(folder)]
    return [row for row in told if row.keys() - {"step", "tokens"}]


def write_report(lives: list[dict]) -> None:
    head = list(lives[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    lines += ["| " + " | ".join(str(life[key]) for key in head) + " |" for life in lives]
    text = f"""# SIGTERM at {SIGNALS} random moments of one run

`make soak` (tests/test_soak_stop.py) at {commit()}: 2 CPU ranks of a tiny TED run of {STEPS} steps, a checkpoint every 7
steps, validation every 10. Each row is one start of the run. SIGTERM goes to the process in column `to`, `after_s` seconds
after the ranks were started (start-up) or after the first step (steps). These moments are drawn uniformly. `step_before` is
the last step in the metrics at that moment, `last_step` the last step at the end, and `saved` the step of the newest
checkpoint. `ranks_took_s` includes the rest of the step, the checkpoint, the close of W&B, and a second or two in which the
ranks agree on which one prints the reason. Before the first step of a start it is only this last part. After a signal
DeepSpeed's launch.py exits with 1. The `deepspeed` command dies of the signal, and the ranks notice this within a second.

In all {len(lives)} starts every finished step was in the checkpoint, and no traceback was shown. After the last restart all
rows of the metrics, except times and memory, were equal to those of an undisturbed run, bit for bit.

"""
    REPORT.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["hang", "raise", "die"])
def test_a_fault_in_the_real_trainer_ends_both_ranks_and_says_why(tmp_path, kind):
    make_model(tmp_path / "teacher", "llama", hidden_size=48)
    make_model(tmp_path / "student", "gpt2", num_hidden_layers=2, seed=1)
    make_corpus(tmp_path / "corpus")
    run = make_run(tmp_path, limits={"step_s": 10.0, "silence_s": 10.0}, checkpoint={"every": 2})
    command = command_of(write_run(tmp_path / "run.toml", run))
    command = [word.replace("launch/pretrain.py", "tests/harness/faulty_pretrain.py") for word in command]
    env = {**os.environ, "FAULT": f"{kind}:1:7"}
    began = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert time.monotonic() - began < 90
    ours = [line for line in done.stderr.splitlines() if "[launch.py" not in line and "DeepSpeed" not in line]
    if kind == "hang":
        assert done.returncode == 4
        assert all(f"rank {rank}| " in done.stderr for rank in (0, 1)) and "fall_over" in done.stderr
        assert ours[-1].startswith("error: step 7 must end within limits.step_s (10 s), but did not: rank")
    if kind == "raise":
        assert done.returncode == 1 and ours[-1] == "ValueError: what really went wrong"
        assert done.stderr.count("Traceback") == 1
    if kind == "die":
        assert done.returncode in (5, 247) and "error: rank 1 must send a heartbeat" in ours[-1]
    assert read_progress(files.newest_checkpoint(run.folder)).step == 6
