"""What the documents name is there: files of this repository, targets of links, and a tour that fits into an hour."""

import re
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


def test_the_tour_takes_at_most_an_hour_at_200_words_a_minute():
    tour = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tour")[2].partition("The reasons")[0]
    words = 0
    for path, _, anchor in (link.partition("#") for link in LINKS.findall(tour)):
        text = (ROOT / path).read_text(encoding="utf-8")
        section = re.search(r"^## The algebra$(.*?)^## ", text, re.M | re.S) if anchor == "the-algebra" else None
        words += len((section[1] if section else text).split())
    assert words <= 60 * 200
