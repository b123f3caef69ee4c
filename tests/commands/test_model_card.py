"""The model card of an export: only what the run's files say, valid for the hub, and without paths, secrets or markup of others."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny import run_values, write_run

from ted_scale.checkpoints.life import Spent
from ted_scale.checkpoints.progress import Progress, progress_as_bytes
from ted_scale.commands import card_facts
from ted_scale.commands.model_card import UNKNOWN, write_card
from ted_scale.config.run import Run

LOG = """10:00:00 run tiny: method ted, fp32, 8 ranks, folder /home/me/runs/tiny
teacher: llama, 4 blocks, width 32, vocabulary 128, 0.05 M parameters, from /home/me/teacher, fingerprint 27b57e21016a
student: gpt2, 2 blocks, width 32, vocabulary 128, 21,376 parameters, from /home/me/student, fingerprint a0dde06cfb39
corpus web: 152,075 tokens to train on, 5,939 held out, digest 6cae06e1c8705ffb
stage filters: 4 steps, 1,024 tokens, 0.1 epochs, 2e+09 FLOPs
stage student: 6 steps, 1,536 tokens, 0.1 epochs, 1.54e+12 FLOPs
10:00:01 losses: triton kernels on NVIDIA H100 80GB HBM3 (sm_90) (auto)
"""
ROWS = [
    {"step": 4, "tokens": 1024, "val/loss": 5.5, "val/teacher_loss": 3.25, "data/web/tokens": 1024},
    {"step": 10, "tokens": 2560, "val/loss": 4.5, "data/web/tokens": 2560, "val/suite/arc_easy": 0.25},
]


def make(tmp_path: Path, *, step: int = 10, log: str | None = LOG, rows=ROWS, **sections) -> tuple[Path, Path, Run]:
    folder = tmp_path / "runs" / "tiny"
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (tmp_path / "student").mkdir(exist_ok=True)
    data = {"corpora": [{"path": str(tmp_path / "web"), "validation": 0.1}]}
    run = Run.model_validate(run_values(tmp_path, **{"data": data, **sections}))
    write_run(folder / "run.toml", run)
    progress = Progress(step=step, tokens=256 * step, spent=Spent(steps=7200.0))
    (checkpoint / "progress.json").write_bytes(progress_as_bytes(progress))
    if log is not None:
        (folder / "log.txt").write_text(log)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, checkpoint, run


def card_of(tmp_path: Path, **more) -> str:
    folder, checkpoint, run = make(tmp_path, **more)
    write_card(tmp_path, folder, checkpoint, run, tmp_path / "student", "float32")
    return (tmp_path / "README.md").read_text()


def test_the_card_says_what_the_runs_files_say(tmp_path):
    text = card_of(tmp_path)
    for said in (
        "| teacher | teacher: llama, 4 blocks", "27b57e21016a", "| all | 5.5 | 4.5 | 3.25 |",
        "| web | 1 | 152,075 | 5,939 | 2,560, 0.0168 epochs",
        "2e+09 in stage filters, 1.54e+12 in stage student", "NVIDIA H100 80GB HBM3 (sm\\_90)",
        "| ranks of the last start | 8 |",
        "| hours in steps | 2 |",
        "ce 1, kl 1, layer 1", "10, 2,560, of 256 a step", "step 10 of 10", "arc\\_easy | 0.25", "arxiv.org/abs/2210.01351",
    ):  # fmt: skip
        assert said in text, said


def test_adapters_are_named_with_rank_alpha_and_targets(tmp_path):
    student = {"path": str(tmp_path / "student")}
    assert "LoRA" not in card_of(tmp_path / "whole", student=student)
    text = card_of(
        tmp_path / "few", student=student | {"lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}}
    )
    assert "| adapters | LoRA of rank 4, alpha 8, on q\\_proj, v\\_proj; merged" in text
    assert "on all-linear; merged" in card_of(tmp_path / "all", student=student | {"lora": {}})


def test_rows_of_whole_examples_have_padding_and_so_no_epochs(tmp_path):
    corpora = [{"path": str(tmp_path / "web"), "validation": 0.1}]
    text = card_of(tmp_path, data={"corpora": corpora, "packing": "examples", "attention": "document"})
    assert "5,939 | 2,560 |" in text


def test_its_head_is_the_hubs_and_names_only_models_that_are_there(tmp_path):
    card_of(tmp_path, teacher={"path": "HuggingFaceTB/SmolLM2-135M"})
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == ["HuggingFaceTB/SmolLM2-135M"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["ted_scale", "distillation", "ted"]
    assert data.license is None and data.datasets is None


def test_a_checkpoint_before_the_end_knows_nothing_of_what_came_later(tmp_path):
    text = card_of(tmp_path, step=4)
    assert "| all | 5.5 | 5.5 | 3.25 |" in text and "4.5 |" not in text.replace("5.5 |", "")
    assert "arc" not in text.partition("## Limits")[2].partition("## Use")[0]
    assert "with all steps of the run" in text and "step 4 of 10" in text


def test_what_no_file_says_is_marked_and_not_made_up(tmp_path):
    text = card_of(tmp_path, log=None, rows=[])
    for row in ("FLOPs", "device", "ranks of the last start"):
        assert f"| {row} | {UNKNOWN} |" in text
    assert f"shape {UNKNOWN}; fingerprint {UNKNOWN}" in text and f"It is {UNKNOWN}" in text
    assert f"| web | 1 | {UNKNOWN} | {UNKNOWN} | {UNKNOWN} | {UNKNOWN} |" in text


def test_a_run_without_a_teacher_names_none(tmp_path):
    text = card_of(tmp_path, method="ce", filters={"steps": 0})
    assert "teacher:" not in text and "| teacher |" not in text and "bibtex" not in text
    assert "distillation" not in ModelCard.load(tmp_path / "README.md").data.tags


def test_no_path_of_this_disk_no_secret_and_no_markup_of_others(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_averylongsecretoftheuser")
    name = "web|<script>x</script> [a](http://b) `c` \x1b[2J averylong"
    corpora = [{"path": "s3://private-bucket/deep/web", "name": name, "validation": 0.1}]
    odd = LOG.replace("NVIDIA H100 80GB HBM3", "hf_averylongsecretoftheuser")
    text = card_of(tmp_path, data={"corpora": corpora}, log=odd)
    for hidden in (
        str(tmp_path),
        "/home/me",
        "private-bucket",
        "<script>",
        "[a](",
        "\x1b",
        "hf_averylongsecretoftheuser",
    ):
        assert hidden not in text, hidden
    row = next(line for line in text.splitlines() if line.startswith("| web"))
    assert row.replace("\\|", "").count("|") == 7


@pytest.mark.parametrize("log", ["\xff\xfe" * 100, "teacher: " * 10_000, "losses: a kernels on " + "x" * 100_000])
def test_a_log_of_a_stranger_is_no_trouble(tmp_path, log):
    assert UNKNOWN in card_of(tmp_path, log=log)


def test_a_run_of_one_rank_has_its_number_of_ranks():
    assert re.match(card_facts.RANKS, "10:00:00 run tiny: method ted, fp32, 1 rank, folder runs/tiny")["ranks"] == "1"
