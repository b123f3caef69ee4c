"""A model by its hub id, where the hub does not answer."""

import threading

import huggingface_hub
import pytest

from ted_scale.base.errors import UserError
from ted_scale.storage import hub


def test_a_hub_that_does_not_answer_has_some_seconds_and_then_only_what_was_fetched_before_is_taken(
    monkeypatch, tmp_path
):
    never, asked = threading.Event(), []

    def fetched_before(name, local_files_only=False, **_):
        asked.append((name, local_files_only))
        if name == "nobody/typing-mistake":
            raise OSError("not fetched")
        return str(tmp_path)

    monkeypatch.setattr(hub, "ANSWER_S", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: never.wait(60))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched_before)
    no_answer = r"the hub does not give it \(TimeoutError: no answer within 0.1 s\)"
    with pytest.raises(UserError, match=no_answer):
        hub.find_folder("--tokenizer", "nobody/typing-mistake")
    with pytest.raises(UserError, match=no_answer):  # a plan has fetched its config alone
        hub.find_folder("teacher.path", "somebody/model")
    assert hub.find_folder("--tokenizer", "somebody/model", hub.TOKENIZER) == tmp_path
    (tmp_path / "model.safetensors").touch()
    assert hub.find_folder("--tokenizer", "somebody/model") == tmp_path
    assert asked == [("nobody/typing-mistake", True), *3 * [("somebody/model", True)]]
    never.set()
