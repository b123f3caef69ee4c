"""The list of `tools/bench/gpu.py --needs`: packages that the bench needs, and their requirements. Versions are those of
.ci/python312.txt, else of this environment. Packages that the other machine already has are left out."""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import parse_toml

ROOT = Path(__file__).resolve().parents[2]
BESIDE = (
    "liger-kernel",
    "torchao",
    "pytest",
)  # Liger is an arm of the losses, torchao of the teacher; the rest works without
UNUSED = {"wandb"}  # no run of the bench has a [wandb]
OTHER_PYTHON = ROOT / ".ci" / "python312.txt"


def needs(freeze: str) -> str:
    """Lines for `pip download --no-deps -r`."""
    if freeze and not Path(freeze).is_file():
        raise UserError(
            f"--needs must name a file that `pip freeze` wrote, but {freeze} is not one; leave it out to list all"
        )
    there = set(versions_in(Path(freeze).read_text(encoding="utf-8"))) if freeze else set()
    pinned = versions_in(OTHER_PYTHON.read_text(encoding="utf-8"))
    names = sorted(closure([*asked_by_the_project(), *BESIDE]) - there)
    return "\n".join(f"{name}=={pinned.get(name) or metadata.version(name)}" for name in names)


def asked_by_the_project() -> list[str]:
    """From pyproject.toml: the checkout may not be installed."""
    project = parse_toml((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text).name for text in project["dependencies"]]


def closure(roots) -> set[str]:
    """Every distribution that these require on Linux, recursively; the search ends at one that is not installed."""
    found, todo = set(), [canonical(root) for root in roots]
    while todo:
        name = todo.pop()
        if name in found or name in UNUSED:
            continue
        try:
            asked = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        requirements = [Requirement(text) for text in asked]
        todo += [canonical(r.name) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def versions_in(text: str) -> dict[str, str]:
    """Of a `pip freeze`, or of bare names."""
    words = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[.*?\])?(?:==(\S+))?", text, re.MULTILINE)
    return {canonical(name): version for name, version in words}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
