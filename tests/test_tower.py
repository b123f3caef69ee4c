"""The tower: a package imports from lower floors only, and no file is on a circle. docs/architecture.md draws it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ted_scale"
FLOORS = (  # the lowest first; packages of one floor do not import each other
    ("base", "kernels.formulas"),
    ("storage", "config", "kernels.triton"),
    ("corpora", "ranks", "kernels"),
    ("data",),
    ("models",),
    ("checkpoints", "distill", "evaluation"),
    ("metrics", "health"),
    ("forecast", "report"),
    ("doctor",),
    ("",),
    ("commands.comparison", "commands.evaluation", "commands.planning"),
    ("commands.cutting",),
    ("commands",),
)
FLOOR = {package: number for number, floor in enumerate(FLOORS) for package in floor}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported_by(path: Path) -> set[str]:
    """The project's files that a file imports anywhere in it, also late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        whole = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
        for name in (name.removeprefix("ted_scale.") for name in whole if name.startswith("ted_scale.")):
            package = name.rpartition(".")[0]
            found.add(
                next(file for file in (name, package, f"{name}.__init__", f"{package}.__init__") if file in FILES)
            )
    return found


IMPORTS = {file: imported_by(path) for file, path in FILES.items()}


def package_of(file: str) -> str:
    return file.rpartition(".")[0]


@pytest.mark.parametrize("file", FILES)
def test_a_package_imports_from_lower_floors_only(file):
    own = package_of(file)
    above = {other for other in IMPORTS[file] if package_of(other) != own and FLOOR[package_of(other)] >= FLOOR[own]}
    assert not above


def test_no_file_is_on_a_circle():
    rest = dict(IMPORTS)
    while free := [file for file, imports in rest.items() if not imports & rest.keys() - {file}]:
        for file in free:
            del rest[file]
    assert not rest


def test_kernels_could_be_lifted_out():
    outside = {other for file in FILES if file.startswith("kernels.") for other in IMPORTS[file]}
    assert all(other.startswith("kernels.") for other in outside)
