"""One thread a process: the tests start ranks beside each other on few cores, where more threads only wait for each other.
Note: OpenMP reads its variable when torch is imported, so that it must be set before.

Without a GPU Triton's kernels are interpreted; Triton reads that when a kernel is imported. The files of LONG run first, in
that order: pytest-xdist's workers take whole files, and at the end no worker should wait long for the other. Beside the ranks of
the first one, which take both cores, run those that mostly wait. `make check` leaves LONG out: these files start ranks, programs
or object stores, compile, draw pages, measure memory, or have models of many blocks or of experts. The files of ONCE ask nothing
of Python itself or of a package that is another one in the second set: its leg leaves them out (.ci/run).
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Torch's store asks DNS for the name of every rank that comes (docs/nodes.md), 5 s and twice where it does not answer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONG = (
    "test_distributed", "test_watch", "test_supervise", "test_doctor", "test_faults", "test_compile", "test_launch",
    "test_nodes", "test_doctor_hosts", "test_docs_run", "test_export", "test_kernel_peers", "test_loader", "test_kernels",
    "test_gpu_bench", "test_schedules", "test_adaptive", "test_fuzz", "test_plan", "test_refit", "test_secrets",
    "test_tokenize", "test_run_files", "test_planning", "test_attention", "test_loss_precision", "test_hostile",
    "test_streaming", "test_saver", "test_placement", "test_copies", "test_report_page", "test_copier", "test_resume",
    "test_fused", "test_tokenize_resume", "test_cut_student", "test_sampling", "test_experts", "test_report",
    "test_report_strangers", "test_compare", "test_owner", "test_transfers", "test_compiled_teacher", "test_remote_packs",
    "test_memory", "test_cut_by_text", "test_targets_resume", "test_wheel", "test_compiled_losses", "test_credentials",
)  # fmt: skip
ONCE = (
    "test_docs", "test_docs_commands", "test_tower", "test_faulty_files", "test_durable", "test_errors", "test_paths",
    "test_sealed", "test_chunk_cache", "test_credentials", "test_transfers", "test_life", "test_slurm", "test_report_page",
)  # fmt: skip


@pytest.fixture(autouse=True)
def files_that_are_missing_stay_missing(monkeypatch) -> None:
    """On the disks here; a file server's client may be told another thing two seconds later (patience.py)."""
    from ted_scale.base import patience

    monkeypatch.setattr(patience, "MISSING_S", 0.0)


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """`make check` does not even import the files that it leaves out."""
    return True if "not long" in config.option.markexpr and collection_path.stem in LONG else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.path.stem in LONG:
            item.add_marker("long")
        if item.path.stem in ONCE:
            item.add_marker("once")


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage, and every full collection would look through all of it."""
    gc.freeze()
