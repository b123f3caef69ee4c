"""Python, the packages against pyproject.toml's ranges, and the compilers."""

import importlib.metadata
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from ted_scale.base import extension
from ted_scale.base.packages import asked_for, install
from ted_scale.doctor.finding import MISSING, NOTE, OK, Finding, last_error, run

OLDEST = (3, 11)
FOR = {  # what a package of an extra is there for
    "s3": "corpora and copies of checkpoints under s3://", "msc": "corpora under msc://", "liger": "fused blocks on a GPU",
    "torchao": "a teacher in 8 bits", "lora": "a student of adapters",
    "compare": "the curves of a comparison", "report": "the page of a run", "eval": "benchmarks",
    "wandb-workspaces": "panels laid out in W&B",
}  # fmt: skip
SOURCE = "#include <Python.h>\nint main() { return 0; }\n"
COMPILE_S = 60


def python() -> list[Finding]:
    """Its version, and which of those of this machine it is."""
    said = f"{sys.version.split()[0]}, {sys.executable}"
    if sys.version_info < OLDEST:
        return [Finding("python", MISSING, said, "make PYTHON=python3.11 setup, or any newer one")]
    return [Finding("python", OK, said)]


def packages() -> list[Finding]:
    """One line for all that fit, and one for each that does not."""
    from packaging.requirements import Requirement

    asked = [(Requirement(text), extra) for text, extra in asked_for() if extra != "docs"]  # for those who write them
    lacking = [each for each, extra in asked if not extra and unfit(each, "")]
    needed = [unfit(each, "") for each in lacking]
    count = sum(not extra for _, extra in asked)
    fits = f"{count - len(needed)} of {count} are there, as pyproject.toml asks"
    return [
        Finding("packages", OK if not needed else MISSING, fits, install(*map(str, lacking)) if lacking else ""),
        *needed,
        *(unfit(each, extra) or there(each, extra) for each, extra in asked if extra),
    ]


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unfit(requirement, extra: str) -> Finding | None:
    found, must = version_of(requirement.name), f"{requirement.name}{requirement.specifier}"
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return None
    said = f"{must} is not installed" if found is None else f"{found} is installed, but must be {must}"
    way = f"{install(str(requirement), extra=extra)}{reason(extra)}" if extra else f'pip install "{requirement}"'
    return Finding(requirement.name, NOTE if extra else MISSING, said, way)


def there(requirement, extra: str) -> Finding:
    return Finding(requirement.name, OK, f"{version_of(requirement.name)}{reason(extra)}")


def reason(extra: str) -> str:
    return f", for {FOR[extra]}" if extra in FOR else ""


def compiler() -> list[Finding]:
    """DeepSpeed compiles an operation for CPU ranks, and Triton its launchers on a GPU; both include Python.h."""
    program = shutil.which("c++") or shutil.which("g++")
    if program is None:
        return [Finding("compiler", MISSING, "there is no C++ compiler", "apt-get install gcc g++")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cpp"
        source.write_text(SOURCE, encoding="utf-8")
        include = f"-I{sysconfig.get_path('include')}"
        ended = run([[program, include, str(source), "-o", f"{folder}/try"]], COMPILE_S)
    if ended.codes != [0]:
        way = "apt-get install gcc g++ python3-dev, of the same Python"
        return [
            Finding("compiler", MISSING, f"{program} does not compile with Python.h: {last_error(ended.said)}", way)
        ]
    return [Finding("compiler", OK, f"{program} compiles with Python.h; {compiled()}")]


def compiled() -> str:
    if built := extension.compiled():
        return f"DeepSpeed's operation for CPU ranks is compiled ({built[0].parent})"
    return "DeepSpeed compiles its operation for CPU ranks at the first start, a minute"
