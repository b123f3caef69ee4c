"""launch/Dockerfile: what it copies is here, and is all that a run imports. Nothing builds it in the tests."""

import re

from places import ROOT

RECIPE = (ROOT / "launch" / "Dockerfile").read_text(encoding="utf-8")


def test_the_recipe_copies_what_is_there_and_every_package_that_a_command_imports():
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", RECIPE, re.M) for word in line.split()}
    assert all((ROOT / word).exists() for word in copied)
    commands = [path for folder in ("launch", "tools", "ted_scale") for path in (ROOT / folder).rglob("*.py")]
    imported = {
        name for path in commands for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text("utf-8"), re.M)
    }
    assert {name for name in imported if (ROOT / name).is_dir()} <= copied
    assert {"requirements.txt", "ds_configs"} <= copied
    assert all((ROOT / path).exists() for path in re.findall(r"/ted_scale/(launch/[\w.]+)", RECIPE))
