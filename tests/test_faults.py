"""What clusters do to a run, done to real ranks: killed at any moment, started again on other numbers of ranks.

The full counts run under `make soak`. Note: ranks are started without the launcher here (launching.py).
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak_report
import store_contents
import torch
from faulty_files import COMPILER, Faults, Rule
from faulty_store import standing_before
from launching import ended, start_ranks
from places import ROOT
from states import state_of, whole
from tiny import make_corpus, make_model, make_run, write_run
from trainer_schedules import Schedule

from ted_scale.base import durable
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.state import KINDS
from tools.bench.object_server import serving

NEEDS_COMPILER = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler for faulty_files.c")

SHARDED, PERSISTENT, OFFLOADED = (
    str(ROOT / path)
    for path in ("tests/harness/zero3_all_sharded.json", "ds_configs/zero3.json", "tests/harness/zero3_offload.json")
)
SETTINGS = {
    "ds_config": PERSISTENT,  # small tensors, all there are here, stay whole on every rank
    "filters": {"steps": 3},
    "train": {"steps": 9, "tokens_per_step": 384, "schedule": "constant", "precision": "bf16", "lr": 1e-4},
    "checkpoint": {"every": 1, "keep": 3},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    make_model(folder / "teacher", "llama", hidden_size=48, num_hidden_layers=2)
    make_model(folder / "student", "gpt2", num_hidden_layers=2, seed=1)
    make_corpus(folder / "corpus")
    return folder


def begin(config: Path, ranks: int) -> list[subprocess.Popen]:
    with config.with_suffix(".out").open("a") as said:
        return start_ranks(ranks, said, ROOT / "launch" / "pretrain.py", "--config", config)


def end(processes, config: Path) -> None:
    assert not any(ended(processes, 240)), config.with_suffix(".out").read_text()[-3000:]


def kill(processes, victim: int) -> None:
    """Kill one rank with SIGKILL, then the others, as a launcher does."""
    processes[victim].send_signal(signal.SIGKILL)
    time.sleep(0.2)
    for process in processes:
        process.kill()
        process.wait()


def train(root: Path, name: str, ranks: int, **sections):
    run = make_run(root, name=name, **{**SETTINGS, **sections})
    config = write_run(root / f"{name}.toml", run)
    end(begin(config, ranks), config)
    return run


def newest_step(run) -> int:
    whole = [s.step for s in files.published(run.folder) if not (s.fault or files.check_digests(s.path))]
    return max(whole, default=0)


def final_state(run) -> dict[str, torch.Tensor]:
    newest = files.newest_checkpoint(run.folder)
    state = state_of(newest)
    return {f"{kind} {name}": whole(state, name, kind) for name in state.shapes for kind in KINDS}


def what_was_read(run) -> list[dict]:
    """The run's position in its corpus at every step."""
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = [{key: value for key, value in row.items() if key.startswith(("step", "tokens", "data/"))} for row in rows]
    return [row for row in found if len(row) > 2]


def losses(run) -> dict[int, float]:
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}


@pytest.fixture(scope="module")
def undisturbed(root):
    return train(root, "undisturbed", 2)


def killed_often(root: Path, name: str, kills: int, rng, stride: int) -> tuple:
    """A run that is killed `kills` times, each time some steps (0 to `stride`) further or while it starts, and then ends. Every
    other kill waits for a save."""
    run = make_run(root, name=name, **SETTINGS)
    config, seen = write_run(root / f"{name}.toml", run), []
    for number in range(kills):
        before, further, lives = newest_step(run), rng.randint(0, stride), len(resumed_from(run))
        processes, patience = begin(config, 2), time.monotonic() + 120
        while newest_step(run) < before + further and all(p.poll() is None for p in processes):
            assert time.monotonic() < patience
            time.sleep(0.01)
        time.sleep(rng.random() * (0.3 if further else 10))
        while number % 2 and further and not unfinished(run) and all(p.poll() is None for p in processes):
            time.sleep(0.0002)
        in_a_save, published = unfinished(run), newest_step(run)
        kill(processes, rng.randrange(2))
        seen.append({"before": before, "after": newest_step(run), "in a save": in_a_save})
        assert seen[-1]["after"] >= published, seen
        assert resumed_from(run)[lives:] in ([], [before])  # [] where it was killed before it had looked
    end(begin(config, 2), config)
    assert resumed_from(run)[-1] == seen[-1]["after"]
    return run, seen


def resumed_from(run) -> list[int]:
    """The steps that the run resumed from, in order."""
    path = run.folder / "log.txt"
    return [int(step) for step in re.findall(r"resuming from .*step_(\d+)", path.read_text())] if path.exists() else []


def unfinished(run) -> bool:
    return any(files.checkpoints_of(run.folder).glob(f"*{durable.PART}"))


def test_a_run_killed_three_times_ends_with_the_weights_of_an_undisturbed_one(root, undisturbed):
    run, seen = killed_often(root, "killed", 3, random.Random(3), stride=6)
    assert any(kill["in a save"] for kill in seen), seen
    ours, theirs = final_state(run), final_state(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert losses(run) == losses(undisturbed)


def resized(root: Path, name: str, ranks: list[int], steps: int = SETTINGS["train"]["steps"]):
    """One run in as many parts as there are entries, each on that number of ranks and with another ds_config of ZeRO-3."""
    for part, count in enumerate(ranks, start=1):
        ds_config = (PERSISTENT, OFFLOADED, SHARDED)[part % 3]
        train_to = {**SETTINGS["train"], "steps": part * steps // len(ranks)}
        run = train(root, name, count, train=train_to, ds_config=ds_config)
        assert len(resumed_from(run)) == part - 1
    return run


def largest_difference(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] / theirs[step] - 1) for step in theirs)


def test_a_run_resumes_with_the_losses_of_an_undisturbed_one_on_4_then_2_then_3_ranks(root, undisturbed):
    run = resized(root, "resized", [4, 2, 3])
    assert largest_difference(losses(run), losses(undisturbed)) < 1e-4
    assert what_was_read(run) == what_was_read(undisturbed)
    assert len(losses(run)) == 12
    assert resumed_from(run) == [6, 9]
    said = (run.folder / "log.txt").read_text()
    assert "step_00000006, which 4 ranks wrote and 2 read\n" in said
    assert "step_00000009, which 2 ranks wrote and 3 read\n" in said


def under_faults(root: Path, undisturbed, seed: int, store=None, **settings) -> dict:
    """A schedule of faults from its seed, and that it ends with the weights of the undisturbed run."""
    schedule, began = Schedule(root, seed, SETTINGS, store, **settings), time.monotonic()
    schedule.to_its_end()
    if store and not schedule.wrong:
        schedule.lose_folder_and_resume()
    assert not schedule.wrong, (seed, schedule.wrong, schedule.lives, schedule.faults.log())
    ours, theirs = final_state(schedule.run), final_state(undisturbed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs), seed
    return {"lives": schedule.lives, "struck": schedule.faults.log(), "s": round(time.monotonic() - began)}


@NEEDS_COMPILER
@pytest.mark.parametrize("seed", [28, 54, 57])  # a full quota, a failed close, a kill: three that need few starts
def test_a_run_whose_files_fail_at_random_ends_with_the_weights_of_an_undisturbed_one(root, undisturbed, seed):
    assert under_faults(root, undisturbed, seed, delays=(0.2,))["struck"]


@pytest.mark.soak
@NEEDS_COMPILER
def test_sixty_runs_whose_files_and_stores_fail_at_random_end_with_the_weights_of_an_undisturbed_one(root, undisturbed):
    """Every third copies its checkpoints. FAULT_SEEDS=20:40 runs a slice; what is in docs/soak.csv is not run again."""
    first, last = map(int, os.environ.get("FAULT_SEEDS", "100:160").split(":"))
    with serving() as moto, standing_before(moto.moto) as store, pytest.MonkeyPatch.context() as patch:
        moto.client().create_bucket(Bucket=store_contents.BUCKET)
        patch.setenv("AWS_ENDPOINT_URL", store.url)
        patch.setenv("MOTO_URL", moto.moto)
        for seed in (seed for seed in range(first, last) if str(seed) not in soak_report.done("faults")):
            found = under_faults(root, undisturbed, seed, store if seed % 3 == 2 else None)
            soak_report.note("faults", seed, **{**found, "struck": len(found["struck"])})


def start_with(root: Path, name: str, rules: list[Rule], **sections) -> tuple:
    """A run of two ranks under these rules, to its end: (run, exit codes, faults)."""
    run, faults = make_run(root, name=name, **{**SETTINGS, **sections}), Faults(root / f"{name}.faults")
    faults.arm(rules)
    config = write_run(root / f"{name}.toml", run)
    with config.with_suffix(".out").open("a") as said:
        words = ROOT / "launch" / "pretrain.py", "--config", config
        return run, ended(start_ranks(2, said, *words, environment=faults.environment()), 400), faults


@pytest.mark.soak
@NEEDS_COMPILER
def test_a_rank_whose_files_pause_for_90_s_is_not_declared_dead_at_default_limits(root, undisturbed):
    """First a read of its corpus, then of the checkpoint that it resumes from."""
    pauses = [Rule("read", f"{root}/corpus.bin", "delay", 90, first=6, rank=1)]
    half = {**SETTINGS["train"], "steps": 3}
    run, codes, faults = start_with(root, "paused", pauses, train=half)
    assert (codes, len(faults.log())) == ([0, 0], 1)
    pauses = [Rule("open", f"{run.folder}/checkpoints/step_*/rank_00000*", "delay", 90, first=1, rank=0)]
    run, codes, faults = start_with(root, "paused", pauses)
    assert (codes, len(faults.log())) == ([0, 0], 2)
    ours, theirs = final_state(run), final_state(undisturbed)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    soak_report.note("pause", "90 s", codes=codes)


@pytest.mark.soak
@NEEDS_COMPILER
def test_a_start_that_reads_slowly_goes_on_beyond_start_s_and_one_that_stands_still_names_the_file(root):
    """A resume of two ranks; the second rank's state file is slow, and then does not answer."""
    run, codes, _ = start_with(root, "slow", [], train={**SETTINGS["train"], "steps": 3})
    state, limits = f"{run.folder}/checkpoints/step_*/rank_00001*", {"step_s": 20.0, "start_s": 20.0}
    _, codes, _ = start_with(root, "slow", [Rule("read", state, "delay", 120)], limits=limits)
    said = (root / "slow.out").read_text()
    assert codes == [4, 4] and re.search(
        r"error: start-up must end or read on within limits.start_s .* while rank \d reads \S+/rank_00001.safetensors",
        said,
    )
    _, codes, faults = start_with(root, "slow", [Rule("read", state, "delay", 12, times=4)], limits=limits)
    assert (codes, len(faults.log())) == ([0, 0], 5)
    soak_report.note("slow start", "48 s, start_s 20", codes=codes)


@pytest.mark.soak
@NEEDS_COMPILER
def test_a_rank_that_is_killed_is_declared_dead_within_30_s_at_default_limits(root):
    rules = [Rule("open", "*/step_00000004.part/rank_00001*", "kill", rank=1)]
    _, codes, faults = start_with(root, "dead", rules)
    took = time.time() - (faults.folder / "log").stat().st_mtime
    soak_report.note("death", "kill -9", s=round(took, 1))
    assert codes == [5, -9] and took <= 30


@pytest.mark.soak
def test_a_hundred_kills_lose_no_published_checkpoint(root, undisturbed):
    """Ten kills a run, and each run ends with the weights of the undisturbed one."""
    theirs, before = final_state(undisturbed), soak_report.done("kill -9")
    for number in range(10):
        if f"{number}" in before:
            continue
        run, seen = killed_often(root, f"killed_{number}", 10, random.Random(number), stride=2)
        ours = final_state(run)
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        in_saves = sum(kill["in a save"] for kill in seen)
        steps = [kill["after"] for kill in seen]
        soak_report.note("kill -9", number, kills=len(seen), in_saves=in_saves, steps=steps, same_weights=same)
        assert same, seen
    assert sum(result["kills"] for result in soak_report.done("kill -9").values()) == 100


@pytest.mark.soak
def test_a_run_resumes_with_the_losses_of_an_undisturbed_one_on_4_2_1_3_and_4_ranks(root):
    sizes = [4, 2, 1, 3, 4]
    settings = {"train": {**SETTINGS["train"], "steps": 15}}
    straight = train(root, "straight", 4, **settings)
    run = resized(root, "resized_often", sizes, steps=15)
    worst = largest_difference(losses(run), losses(straight))
    assert what_was_read(run) == what_was_read(straight)
    soak_report.note("ranks", "-".join(map(str, sizes)), worst_relative_difference=worst)
    assert worst < 1e-4


@pytest.mark.soak
def test_a_step_waits_at_most_a_tenth_of_the_time_of_a_foreground_save(tmp_path):
    """With 500 MB of state on each of two ranks."""
    script, launcher = str(ROOT / "tools" / "bench" / "saving.py"), str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_gpus", "2", script, "--megabytes", "500", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    found = re.search(r"ratio\s+([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr[-2000:]
    soak_report.note("stall", "500 MB a rank", ratio=float(found[1]))
    assert float(found[1]) <= 0.1
