"""Our reader of safetensors beside the library's, and while a file server pauses."""

import errno
import json
import os
import subprocess
import sys

import faulty_files
import pytest
import torch
from faulty_files import Faults, Rule
from places import HARNESS, ROOT
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ted_scale.base import patience
from ted_scale.base.errors import Gone, UserError
from ted_scale.storage import tensor_file
from ted_scale.storage.tensor_file import ABOUT, DTYPES, PIECE, Stretch


def read(path, key: str, like: torch.Tensor) -> torch.Tensor:
    tensor_file.fill(path, lambda entries: [Stretch(key, 0, like.view(-1))])
    return like


def test_tensors_of_every_dtype_are_read_as_the_library_wrote_them(tmp_path):
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0)}
    tensors["large"] = torch.arange(PIECE // 4 + 1000).float()  # read in two calls
    save_file(tensors, tmp_path / "t", metadata={"a": "b"})
    header = tensor_file.header_of(tmp_path / "t")
    assert header.about == {"a": "b"} and {k: e.shape for k, e in header.entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        found = read(tmp_path / "t", name, torch.zeros_like(tensor))
        assert found.view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8)), name
        widened = read(tmp_path / "t", name, torch.zeros(tensor.shape, dtype=torch.complex128))
        assert torch.equal(widened, tensor.to(torch.complex128)), name


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "a hole": {"a": A, "b": {**A, "data_offsets": [12, 20]}},
    "an overlap": {"a": A, "b": {**A, "data_offsets": [4, 12]}},
    "one range twice": {"a": A, "b": A},
    "a hole before the first": {"a": {**A, "data_offsets": [4, 12]}},
    "more than the file": {"a": {**A, "shape": [2**40], "data_offsets": [0, 2**42]}},
    "less than the file": {},
    "another size than its shape": {"a": {**A, "shape": [3]}},
    "a product beyond 64 bits": {"a": {**A, "shape": [2**40, 2**40, 0, 1]}},
    "offsets that fall": {"a": {**A, "shape": [0], "data_offsets": [8, 0]}},
    "a negative offset": {"a": {**A, "data_offsets": [-8, 0]}},
    "three offsets": {"a": {**A, "data_offsets": [0, 4, 8]}},
    "a dtype of nobody": {"a": {**A, "dtype": "F33"}},
    "a shape of texts": {"a": {**A, "shape": ["2"]}},
    "a fraction": {"a": {**A, "shape": [2.0]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "no table": [A],
    "a number about it": {ABOUT: {"a": 1}, "a": A},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_the_library_refuses_is_refused_in_a_sentence(tmp_path, name):
    text = json.dumps(HOSTILE[name]).encode()
    (tmp_path / "t").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "t", framework="pt")
    with pytest.raises(UserError, match=r"t must be a whole safetensors file, but is not: .*; copy it again"):
        tensor_file.header_of(tmp_path / "t")


def test_a_file_is_read_through_links_and_a_pipe_is_not_waited_for(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "t")
    (tmp_path / "link").symlink_to(tmp_path / "t")
    assert read(tmp_path / "link", "a", torch.zeros(3)).sum() == 3
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe must be a whole safetensors file, but is not: it is a pipe"):
        tensor_file.header_of(tmp_path / "pipe")


@pytest.mark.long  # starts a program
@pytest.mark.skipif(faulty_files.COMPILER is None, reason="there is no C compiler for faulty_files.c")
def test_other_threads_run_while_a_file_is_opened_and_read_from_a_server_that_pauses(tmp_path):
    """safe_open kept Python's lock: heartbeats stopped, and the rank counted as dead."""
    save_file({"a": torch.ones(1000)}, tmp_path / "t")
    faults = Faults(tmp_path / "faults")
    faults.arm([Rule("open", "*/t", "delay", 1), Rule("read", "*/t", "delay", 1, first=2)])
    command = [sys.executable, HARNESS / "stalled_reads.py", tmp_path / "t"]
    environment = {**os.environ, **faults.environment(), "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60).stdout
    took, stood_still = map(float, said.split())
    assert took > 2 and stood_still < 0.8


def test_errors_of_the_file_system_are_waited_out_and_end_with_code_5_and_a_file_that_is_cut_with_code_2(
    tmp_path, monkeypatch
):
    path, errors, preadv = tmp_path / "t", [], os.preadv
    save_file({"a": torch.ones(3)}, path)

    def fail(*arguments):
        if errors:
            raise OSError(errors.pop(), os.strerror(errno.ESTALE))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    errors += [errno.ESTALE, errno.EIO]
    assert read(path, "a", torch.zeros(3)).sum() == 3 and not errors
    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    errors += [errno.ESTALE] * 100
    with pytest.raises(Gone, match=r"t must be readable, but was not for .*Stale file handle"):
        tensor_file.header_of(path)
    errors.clear()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="t must be a whole safetensors file"):
        tensor_file.header_of(path)
