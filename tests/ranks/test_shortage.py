"""Running out of memory is distinguished from other errors, and the advice fits the run."""

import errno
from types import SimpleNamespace

import numpy
import pytest
import torch
from tiny import make_run

from ted_scale import run as build
from ted_scale.base.errors import MEMORY, OutOfMemory
from ted_scale.ranks import shortage

DS_CONFIG = {"zero_optimization": {"stage": 3}}


def too_much():
    torch.empty(1 << 60)


def of_numpy():
    numpy.empty(1 << 50)


def of_a_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")


def of_pinned_memory():
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


def of_a_library():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def of_the_system():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize("fail", [too_much, of_numpy, of_a_device, of_pinned_memory, of_a_library, of_the_system])
def test_running_out_of_memory_is_a_sentence_with_its_own_exit_code(fail):
    with pytest.raises(OutOfMemory) as caught, shortage.enough("lower something"):
        fail()
    said = str(caught.value)
    assert said.startswith("a rank's memory must hold ") and said.endswith("); lower something") and "\n" not in said
    assert caught.value.exit_code == MEMORY


@pytest.mark.parametrize("error", [RuntimeError("sizes differ"), OSError(errno.ENOSPC, "full"), KeyError("x")])
def test_other_errors_are_not_changed(error):
    with pytest.raises(type(error)), shortage.enough("lower something"):
        raise error


def test_a_run_that_runs_out_of_memory_gets_its_own_advice(tmp_path, monkeypatch):
    def full(plan, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(build, "check_engine_config", lambda plan: None)
    monkeypatch.setattr(build, "start_ranks", lambda run, check: torch.device("cpu"))
    monkeypatch.setattr(build, "train_run", full)
    monkeypatch.setattr(build, "replace", lambda plan, **changes: plan)
    monkeypatch.setattr(build, "agreed", lambda placement: placement)
    run = make_run(tmp_path, train={"micro_batch": 4})
    plan = SimpleNamespace(run=run, ds_config=DS_CONFIG, placement=None, world=1)
    with pytest.raises(
        OutOfMemory, match=r"\(CUDA out of memory\); lower train.micro_batch \(4\), set student.gradient"
    ):
        build.run_plan(plan)


def test_advice_names_only_what_the_run_does_not_do_yet(tmp_path):
    run = make_run(tmp_path, train={"micro_batch": 4})
    assert shortage.ways_to_need_less(run, DS_CONFIG, True, "sharded").startswith("set teacher.placement = 'sharded', ")
    reading = make_run(tmp_path, teacher={"early": True, "micro_batch": 4})
    ways = shortage.ways_to_need_less(reading, DS_CONFIG, on_cpu=True)
    assert ways.startswith("set teacher.early = false, lower teacher.micro_batch (4), ")
    assert shortage.ways_to_need_less(run, DS_CONFIG, on_cpu=False) == (
        "lower train.micro_batch (4), set student.gradient_checkpointing = true, lower data.seq_len (32), set "
        "loss.chunk_tokens lower than its default, take ds_config = 'ds_configs/zero3_offload_optimizer.json', or give it "
        "more ranks; --dry-run has an estimate by terms"
    )
    student = {"gradient_checkpointing": True}
    assert shortage.ways_to_need_less(make_run(tmp_path, student=student), DS_CONFIG, on_cpu=True) == (
        "lower data.seq_len (32), or give it more ranks; --dry-run has an estimate by terms"
    )
