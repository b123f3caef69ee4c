"""On a CUDA device: the tiny run has the losses it has on CPU, and bf16 trains."""

import json
import os
import subprocess
import sys
from contextlib import closing

import pytest
import torch
from tiny import make_corpus, make_model, make_run, pretrain, write_run

from ted_scale.data.loader import Loader
from ted_scale.data.stream import batch, open_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SETTINGS = {"filters": {"steps": 4}, "train": {"steps": 6}}


def trained(root, name: str, *, cpu: bool = False, **sections) -> list[float]:
    run = make_run(root, name=name, **{**SETTINGS, **sections})
    env = {**os.environ, "DS_ACCELERATOR": "cpu" if cpu else "cuda"}
    done = pretrain("--config", write_run(root / f"{name}.toml", run), env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/total"] for row in rows if "loss/total" in row]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    make_model(folder / "teacher", "llama", hidden_size=48)
    make_model(folder / "student", "llama", num_hidden_layers=2, seed=1)
    make_corpus(folder / "corpus")
    return folder


def test_fp32_losses_on_the_device_are_those_of_the_cpu(root):
    device, cpu = trained(root, "device"), trained(root, "cpu", cpu=True)
    assert len(device) == 10
    assert max(abs(a - b) for a, b in zip(device, cpu, strict=True)) < 1e-3


def test_bf16_on_the_device_follows_fp32(root):
    bf16 = trained(root, "bf16", train={"steps": 6, "precision": "bf16"})
    fp32 = trained(root, "fp32")
    assert all(abs(a - b) < 0.05 * b for a, b in zip(bf16, fp32, strict=True))


def test_buffers_on_the_device_are_those_that_transformers_builds(root):
    """Bit for bit: they are worked out on the host, as transformers does, and then moved."""
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    done = subprocess.run([sys.executable, "-c", BUFFERS, root / "teacher"], env=environment, check=False)
    assert done.returncode == 0


BUFFERS = """
import sys, torch, transformers
from ted_scale.models.inspection import inspect
from ted_scale.ranks.group import start_ranks
from ted_scale.models.zero import build_network
device = start_ranks()
config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
ours = build_network(inspect("model", sys.argv[1]), ds_config=config, dtype=torch.bfloat16)
theirs = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
    assert a.device == device and a.dtype == b.dtype and torch.equal(a.cpu(), b), name
assert all(p.ds_tensor.device == device for p in ours.parameters())
"""


def test_batches_on_the_device_are_those_of_the_cpu_while_it_is_busy(root):
    """Kernels that take long lie before every use of a batch: a copy that nobody waited for, or memory that was given back
    too early, would show."""
    run = make_run(root, data={"seq_len": 32, "attention": "document"})
    stream = open_stream(run.data, 1, 128)
    settings = {"prefetch": 3, "micro_batch": 2, "rank": 0, "world": 1}
    stretch = {"start": 0, "stop": 400, "samples_per_step": 8}
    with closing(Loader(**settings, device="cuda:0")) as loader:
        seen = []
        for micros in loader.steps(stream, **stretch):
            torch.cuda._sleep(10_000_000)
            seen += [micro.moved(torch.clone) for micro in micros]
            del micros
    assert len(seen) == 200
    for number, micro in enumerate(seen):
        there, here = [], []
        micro.moved(there.append)
        batch(stream, [2 * number, 2 * number + 1]).moved(here.append)
        assert len(there) == 5 and all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))
