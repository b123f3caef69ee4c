"""One thread a process: the tests start ranks beside each other on few cores, where more threads only wait for each other.
Without a GPU Triton's kernels are interpreted; Triton reads that when a kernel is imported."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
