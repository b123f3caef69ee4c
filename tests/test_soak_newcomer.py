"""A newcomer's first hour: the commands of the quick start, then README's for your own text, as they stand there, in a fresh clone.

Note: `make demo` installs every package into the clone's .venv, so this needs their index and some minutes. Names in the documents
stand for what a newcomer has: the repository's address, a folder of texts, a teacher, which is here the one of the demo.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from places import ROOT
from test_docs_commands import BLOCK

ENDS = re.compile(r"held-out loss ([\d.]+) before, ([\d.]+) after")
OF_THE_SESSION = {"VIRTUAL_ENV", "PYTHONPATH", "DS_ACCELERATOR"}


def block_of(document: str, words: str = "") -> str:
    """The first block of commands behind the words."""
    return BLOCK.search((ROOT / document).read_text(encoding="utf-8").partition(words or "\n")[2])[1]


def typed(commands: str, folder: Path) -> list[tuple[float, float]]:
    """Held-out loss before and after each run that the commands make."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_THE_SESSION}
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [(float(before), float(after)) for before, after in ENDS.findall(done.stdout)]


@pytest.mark.soak
def test_the_first_commands_of_the_documents_train_on_a_newcomers_text(tmp_path):
    texts = tmp_path / "MY_TEXT"
    shutil.copytree(ROOT / "docs", texts, ignore=shutil.ignore_patterns("_site", "*.csv", "*.py", "*.svg", "*.png"))
    quick = block_of("docs/quickstart.md").replace("URL", str(ROOT)).replace("MY_TEXT", str(texts))
    before, after = typed(quick, tmp_path)[-1]
    assert after < before
    clone = tmp_path / "ted_scale"
    (clone / "models").mkdir()
    (clone / "models/teacher").symlink_to(clone / "runs/demo/teacher_hf")
    (clone / "my_texts").symlink_to(texts)
    before, after = typed(block_of("README.md", "**Your own text**"), clone)[-1]
    assert after < before
