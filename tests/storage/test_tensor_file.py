"""A safetensors file that cannot be read is no mistake of the user, and one that is not whole is."""

import errno
import os

import pytest
import torch

from ted_scale.base.errors import Gone, UserError
from ted_scale.storage import tensor_file


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rank_00000.safetensors"
    path.write_bytes(b"".join(tensor_file.as_bytes({"w": torch.arange(4.0)})))
    return path


def test_an_error_of_the_file_system_ends_with_code_5_and_a_file_that_ends_early_with_code_2(path, monkeypatch):
    found = tensor_file.header_of(path)
    assert found.entries["w"].shape == (4,)

    def fail(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(Gone, match=f"{path.name} must be readable .*Stale file handle"):
            tensor_file.header_of(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path.name} must be a whole safetensors file"):
        tensor_file.header_of(path)
