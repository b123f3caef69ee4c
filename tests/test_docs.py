"""What the documents name is there: files of this repository, targets of links, every key of the run file, and a tour that fits
into an hour. The site builds without a warning, and its pages ask no network."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "ted_scale/kernels/README.md",
    *ROOT.glob("docs/**/*.md"),
]
PATHS = re.compile(r"(?<![\w/.-])(?:ted_scale|tests|tools|docs|launch|ds_configs)/[\w./-]*\w")
LINKS = re.compile(r"\]\(([^)\s]+)\)")
PLACEHOLDERS = {"launch/runs/NAME.toml"}


def anchors(document: Path) -> set[str]:
    """GitHub's anchor of every heading."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_file_and_link_in_a_document_exists(document):
    text = document.read_text(encoding="utf-8")
    missing = {path for path in PATHS.findall(text) if path not in PLACEHOLDERS and not (ROOT / path).exists()}
    for link in (link for link in LINKS.findall(text) if "://" not in link):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.add(link)
    assert not missing


def test_the_tour_has_the_words_it_says_and_at_most_an_hour_of_them():
    tour = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tour")[2].partition("The reasons")[0]
    words = 0
    for path, _, anchor in (link.partition("#") for link in LINKS.findall(tour)):
        text = (ROOT / path).read_text(encoding="utf-8")
        section = re.search(r"^## The algebra$(.*?)^## ", text, re.M | re.S) if anchor == "the-algebra" else None
        words += len((section[1] if section else text).split())
    said = int(re.search(r"about ([\d,]+) words", tour)[1].replace(",", ""))
    assert words <= 60 * 200 and abs(words - said) < 0.02 * words, words


def test_the_reference_of_keys_is_what_the_code_says_and_no_key_is_without_a_meaning():
    page = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(ROOT / "docs/keys.py"))["page"](), (
        "run `python docs/keys.py`, and commit what it wrote"
    )
    assert not re.findall(r"^\| `(.*?)` .*\|  \|$", page, re.M)


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_its_pages_load_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    pages = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")]
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//|<link rel=\"stylesheet\"[^>]* href=\"(?:https?:)?//"
    )
    assert len(pages) > 60
    assert not [page[:80] for page in pages if loads.search(page)]


RUN = re.compile(
    r"`(?:OMP_NUM_THREADS=1 )?(?:pytest|python|deepspeed) |the same\b|\[flops.md\]"
)  # arithmetic has no command


def test_every_figure_of_the_measurements_names_the_command_that_makes_it():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| figure")]
    rows = [row for header, _, *rows in tables for row in rows if header.endswith("| command |")]
    assert len(rows) > 60
    assert not [row for row in rows if not RUN.search(row.removesuffix(" |").rpartition(" | ")[2])]
