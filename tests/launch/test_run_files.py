"""The run files and plans of launch/: each dry-runs with hollow models, so that one that goes stale is found.

The header of a run file quotes its dry run, as HEADER reads it, or says what to expect of a run that was measured.
"""

import math
import re
from pathlib import Path

import pytest
from hollow import MODELS, PUBLISHED, make_hollow_model, make_inputs
from places import ROOT

from ted_scale.commands.comparison import plan as plans
from ted_scale.config.run_file import load_run
from ted_scale.distill import memory
from ted_scale.engines import check_engine_config
from ted_scale.plan import Plan, describe, make_plan, stage_flops
from ted_scale.ranks import capacity
from ted_scale.storage.tensor_file import header_of

RUNS = sorted((ROOT / "launch/runs").glob("*.toml"))
PLANS = sorted((ROOT / "launch/plans").glob("*.toml"))
LAUNCHED = re.compile(r"^#   .*--num_gpus (\d+) .*launch/pretrain.py", re.M)
HEADER = re.compile(
    r"^# Dry run with --ranks (\d+) on a (CPU|GPU): ([\d.]+) GiB a rank(?: in stage I, ([\d.]+) in stage II)?; "
    r"(\S+?)(?: and (\S+))? FLOPs",
    re.M,
)
GPU_GIB = 70  # of the 80 GB = 74.5 GiB of a GPU; the rest is the process and what the allocator keeps


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder that run files are started from; their models and corpora are made in it once for all tests."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("launch", "ds_configs"):
        (root / folder).symlink_to(ROOT / folder)
    return root


def dry_run(root: Path, file: Path, ranks: int) -> Plan:
    run = load_run(file)
    make_inputs(root, run)
    plan = make_plan(run, ranks)
    check_engine_config(plan)
    assert f"{ranks} rank" in describe(plan)
    return plan


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_a_run_file_dry_runs_and_its_header_has_the_numbers(root, file, monkeypatch):
    monkeypatch.chdir(root)
    text = file.read_text(encoding="utf-8")
    quoted, launched = HEADER.search(text), LAUNCHED.search(text)
    device = {"CPU": "cpu", "GPU": "cuda"}[quoted[2] if quoted else "CPU"]
    monkeypatch.setattr(capacity, "of_a_rank", lambda ranks: (device, 80e9))
    plan = dry_run(root, file, int((quoted or launched)[1]))
    assert plan.pairs[-1:] in ([], [(plan.student.layers - 1, plan.teacher and plan.teacher.layers - 1)])
    if quoted is None:
        assert "# Expect" in text
        return
    found = [sum(memory.terms(plan, stage, device)[0].values()) / 2**30 for stage in plan.stages]
    found += [stage_flops(plan, stage) for stage in plan.stages]
    assert [float(number) for number in quoted.groups()[2:] if number] == pytest.approx(found, rel=0.05)
    assert max(found[: len(plan.stages)]) < GPU_GIB


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_a_plan_loads_with_all_its_arms(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = plans.load(str(file))
    assert plan.run in {str(run.relative_to(ROOT)) for run in RUNS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_hollow_model_has_as_many_parameters_as_the_real_one(root, name):
    file = make_hollow_model(root, name) / "model.safetensors"
    assert sum(math.prod(entry.shape) for entry in header_of(file).entries.values()) == PUBLISHED[name]
    assert file.stat().st_blocks * 512 < 1 << 20  # on the disk


def test_every_hollow_model_stands_for_one_of_a_run_file():
    runs = [load_run(file) for file in RUNS]
    assert {*MODELS} <= {model.path for run in runs for model in (run.teacher, run.student) if model}
