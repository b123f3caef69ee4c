"""What pyproject.toml asks for, and the way to a package that is not there.

Note: ranges come from pyproject.toml where there is one beside the package, because an editable installation keeps those of
the day when it was installed. Without it, somebody installed a wheel, and has no folder for `-e`.
"""

import importlib.metadata

from ted_scale.base import shipped
from ted_scale.base.parsing import parse_toml


def asked_for() -> list[tuple[str, str]]:
    """(requirement, its extra or "")"""
    if shipped.PROJECT.is_file():
        project = parse_toml(shipped.PROJECT.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {})
        return [(text, "") for text in project["dependencies"]] + [
            (t, extra) for extra in extras for t in extras[extra]
        ]
    try:
        asked = importlib.metadata.requires("ted_scale") or ()
    except importlib.metadata.PackageNotFoundError:  # a copy of the package's folder alone, on PYTHONPATH
        asked = ()
    split = (text.partition(";") for text in asked)
    return [(text, marker.partition('"')[2].rstrip('" ') if "extra" in marker else "") for text, _, marker in split]


def requirement_of(name: str) -> str:
    """As it is asked for, such as torch>=2.11."""
    from packaging.requirements import Requirement

    return next((text for text, _ in asked_for() if Requirement(text).name == name), name)


def install(*requirements: str, extra: str = "") -> str:
    """The way to packages."""
    if not shipped.PROJECT.is_file():
        return " ".join(["pip install", *(f'"{requirement}"' for requirement in requirements)])
    return f'pip install -e ".[{extra}]"' if extra else "make setup, or pip install -e ."


def install_extra(extra: str) -> str:
    """The way to all that an extra brings."""
    brought = [text for text, of in asked_for() if of == extra]
    return install(*brought, extra=extra) if brought else f"install what ted_scale's pyproject.toml lists under {extra}"
