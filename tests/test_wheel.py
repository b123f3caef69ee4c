"""The wheel, built from what a source distribution carries: its names, and commands from a folder without the repository; the
version that the changelog has."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hollow import make_inputs
from places import ROOT

import ted_scale
from ted_scale.config.run_file import load_run

PARTS = (
    "ted_scale",
    "ds_configs",
    "launch",
    "tools",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
EXAMPLE = "launch/runs/smollm2_half.toml"


def run(*words, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Not built in the repository, where build/ may hold what an earlier build left."""
    place = tmp_path_factory.mktemp("wheel")
    (place / "source").mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, place / "source" / part)
    run("-c", f"from setuptools.build_meta import build_sdist as b; b({str(place)!r})", cwd=place / "source")
    (packed,) = place.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (source,) = (place / "unpacked").iterdir()
    run("-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index", "-w", place, source, cwd=place)
    (built,) = place.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_its_data_and_no_other_name(wheel):
    names = {*zipfile.ZipFile(wheel).namelist()}
    info = f"ted_scale-{ted_scale.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"ted_scale", info}
    here = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "ted_scale").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    examples = [*ROOT.glob("ds_configs/*"), *ROOT.glob("launch/runs/*"), *ROOT.glob("launch/plans/*")]
    beside = {f"ted_scale/{p.relative_to(ROOT)}" for p in examples}
    assert {name for name in names if name.startswith("ted_scale/")} == here - {"ted_scale/kernels/README.md"} | beside
    assert "ted_scale/py.typed" in names and f"{info}/licenses/LICENSE" in names


def test_an_installed_command_finds_examples_from_any_folder(wheel, tmp_path, monkeypatch):
    place, folder = tmp_path / "packages", tmp_path / "anywhere"
    run("-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--target", place, wheel, cwd=tmp_path)
    command, packages = place / "bin" / "ted-scale", {"PYTHONPATH": str(place)}
    folder.mkdir()
    monkeypatch.chdir(folder)
    make_inputs(folder, load_run(EXAMPLE))
    assert run(command, "--version", cwd=folder, **packages) == f"ted-scale {ted_scale.__version__}\n"
    said = run(command, "pretrain", "--config", EXAMPLE, "--dry-run", cwd=folder, **packages)
    assert 'ds_config = "ds_configs/zero3.json"' in said and "GiB" in said
    where = run("-c", "from ted_scale.base.shipped import HOME; print(HOME)", cwd=folder, **packages)
    assert Path(where.strip()) == place / "ted_scale"


def test_the_newest_release_of_the_changelog_is_dated_and_this_version():
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert re.fullmatch(
        rf"{re.escape(ted_scale.__version__)} - \d{{4}}-\d\d-\d\d", next(h for h in heads if h != "Unreleased")
    )
