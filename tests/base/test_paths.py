"""A name that stands in a file leads into the file's own folder or is refused."""

import pytest

from ted_scale.base.errors import UserError
from ted_scale.base.paths import checked_name, inside

NAMES = ["a", "a.bin", "web-00001", "step_00000004", "a/b.safetensors", "..a", "a..", "é", "名 前", "-x", "~"]
OTHERS = {
    "absolute": "/etc/passwd",
    "parent": "../x",
    "parent inside": "a/../../x",
    "parent that comes back": "a/../b",
    "parent alone": "..",
    "itself": ".",
    "nothing": "",
    "empty part": "a//b",
    "trailing slash": "a/",
    "NUL": "a\0b",
    "newline": "a\nb",
    "escape": "a\x1b[2J",
    "backslash": "..\\x",
    "surrogate": "a\ud800",
    "long": "a" * 256,
    "long in bytes": "é" * 128,
    "number": 7,
    "list": ["a"],
    "none": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_name_is_a_path_of_the_folder(tmp_path, name):
    assert inside(tmp_path, name, "m.json") == tmp_path / name


@pytest.mark.parametrize("name", OTHERS.values(), ids=OTHERS)
def test_a_name_that_leads_elsewhere_is_refused_in_one_sentence(tmp_path, name):
    with pytest.raises(
        UserError, match=r"^m\.json must name files of its own folder, but names .+; copy it again"
    ) as caught:
        inside(tmp_path, name, "m.json")
    assert str(caught.value).isprintable()
    with pytest.raises(UserError):
        checked_name(name, "m.json")


def test_a_link_may_lead_only_to_files_in_the_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "blobs").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "blobs" / "1").write_text("y")
    (folder / "near").symlink_to("blobs/1")
    (folder / "far").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    assert inside(folder, "near", "m").read_text() == "y"
    for name in ("far", "up", "up/secret", "loop", "loop/x", "gone"):
        with pytest.raises(UserError, match="own folder"):
            inside(folder, name, "m")


def test_the_folder_itself_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "a").write_text("x")
    assert inside(tmp_path / "link", "a", "m").read_text() == "x"
