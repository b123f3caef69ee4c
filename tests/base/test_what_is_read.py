"""What reads much says what it reads and how far it is, so that a start that reads for hours is known from one that hangs."""

import pytest
import torch

from ted_scale.base import progress, sealed
from ted_scale.storage import tensor_file
from ted_scale.storage.tensor_file import Stretch

NUMBERS = 3_000_000  # several pieces


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rank_00000.safetensors"
    path.write_bytes(b"".join(tensor_file.as_bytes({"w": torch.zeros(NUMBERS)})))
    return path


def fill(path):
    tensor_file.fill(path, lambda _: [Stretch("w", 0, torch.empty(NUMBERS))])


@pytest.mark.parametrize("read", [sealed.digest_of, fill])
def test_a_digest_and_a_state_file_are_told_piece_by_piece(path, monkeypatch, read):
    told, took, before = [], progress.took, progress.now()[0]
    monkeypatch.setattr(progress, "took", lambda count: (took(count), told.append(progress.now())))
    read(path)
    assert {what for _, what in told} == {str(path)}
    assert len(told) >= 3 and told[-1][0] - before == path.stat().st_size
    assert progress.now()[1] == ""


def test_what_never_answers_is_told_before_what_was_begun_later_and_a_read_that_fails_is_told_no_more():
    with pytest.raises(OSError), progress.reading("a folder"), progress.reading("its file"):
        assert progress.now()[1] == "its file"
        raise OSError
    assert progress.now()[1] == ""
