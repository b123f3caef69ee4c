"""Long ones: how fast the trainer starts and its samples come, and what TED costs beside logit distillation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_corpus, make_model, make_run, pretrain, write_run

pytestmark = pytest.mark.soak
BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench"
DEMO_SIZE = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
             "intermediate_size": 704, "max_position_embeddings": 512, "vocab_size": 4096}  # fmt: skip


def bench(name: str, *arguments) -> str:
    command = [sys.executable, str(BENCH / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_first_step_comes_at_most_5_s_after_the_imports(tmp_path):
    make_model(tmp_path / "teacher", "llama")
    make_model(tmp_path / "student", "llama", num_hidden_layers=2)
    make_corpus(tmp_path / "corpus")
    config = write_run(tmp_path / "run.toml", make_run(tmp_path, filters={"steps": 1}, train={"steps": 1}))
    said = bench("startup.py", "--config", config, "--rounds", 5)
    assert float(re.search(r"difference (-?[\d.]+) s", said)[1]) <= 5, said


def test_a_step_of_ted_takes_at_most_a_quarter_longer_than_one_of_kd(tmp_path):
    make_model(tmp_path / "teacher", "llama", initializer_range=0.02, **DEMO_SIZE)
    make_model(tmp_path / "student", "llama", initializer_range=0.02, **{**DEMO_SIZE, "num_hidden_layers": 4})
    make_corpus(tmp_path / "corpus", vocabulary=4096)
    sections = {"data": {"seq_len": 256}, "filters": {"steps": 1}}
    train = {"steps": 1, "tokens_per_step": 2048, "micro_batch": 4}
    run = make_run(tmp_path, train=train, **sections)
    config = write_run(tmp_path / "run.toml", run)
    assert pretrain("--config", config).returncode == 0
    said = bench(
        "step.py", "--config", config, "--arms", "kd", "ted", "--steps", 11, "--no-plain", "--memory", "default"
    )
    assert float(re.search(r"ted / kd ([\d.]+)", said)[1]) <= 1.25, said


def test_samples_are_read_as_fast_as_by_megatron_s_own_dataset():
    said = bench("loader.py")
    assert float(re.search(r"document .*GPTDataset ([\d.]+) \(", said)[1]) >= 0.95, said


def test_the_first_batch_at_a_billion_costs_what_the_first_one_costs():
    said = bench("first_batch.py", "--rounds", 61)
    assert 0.9 < float(re.search(r"at 0 ([\d.]+) \(", said)[1]) < 1.1, said
    near, far = (float(x) for x in re.findall(r"([\d.]+) MiB", said))
    assert abs(near - far) < 50, said
