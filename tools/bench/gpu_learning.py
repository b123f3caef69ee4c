"""Part d of tools/bench/gpu.py: does it learn? Trains a teacher of 30 M parameters on the Python packages of this machine, then
students of half its blocks by each method, all for the same seconds.

A short run measures the speed of a method and gives its number of steps, so that each method has its whole schedule. The
row has the seconds of its steps with its loss. Start-up does not count, nor the pass over some thousand tokens in which
filters start.
"""

import gc
import json
import shutil
import statistics
import sysconfig
from pathlib import Path
from typing import NamedTuple

from ted_scale.commands import cut_student, export_hf, new_model, tokenize_corpus, train_tokenizer
from ted_scale.config.run import Run
from tools import demo

ZERO3 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json"
ARMS = {"ce": {}, "kd": {}, "ted": {}, "hint": {"method": "ted", "loss": {"preset": "hint"}}}
SPEED_STEPS, LEAST_STEPS = 16, 2


class Sizes(NamedTuple):
    text: int  # characters
    vocabulary: int
    model: list[str]
    keep: str
    seq_len: int
    tokens_per_step: int
    micro_batch: int
    validation: int  # tokens
    most_steps: int


FULL = Sizes(
    60_000_000, 8192,
    ["hidden_size=512", "num_hidden_layers=8", "num_attention_heads=8", "num_key_value_heads=8",
     "intermediate_size=1408", "max_position_embeddings=512", "tie_word_embeddings=true"],
    "0,2,5,7", 512, 32_768, 64, 524_288, 100_000,
)  # fmt: skip
TINY = Sizes(
    400_000, 400,
    ["hidden_size=32", "num_hidden_layers=4", "num_attention_heads=2", "num_key_value_heads=2", "intermediate_size=64",
     "max_position_embeddings=64", "tie_word_embeddings=true"],
    "0,3", 64, 256, 4, 1024, 3,
)  # fmt: skip


def teacher(task, write) -> None:
    task.device()
    prepare(task, write, 0.0)


def prepare(task, write, until: float) -> None:
    """Text, tokenizer, shards, teacher, the students' start; results that exist are reused. `until` is how much time the task
    may have left after it."""
    folder, sizes = task.work / "learning", TINY if task.tiny else FULL
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder, sizes)
    if not (folder / "student").exists():
        seconds = seconds_of_training(task.left - until - 30, task)
        found = train_for(folder, sizes, start_ranks(), seconds, "teacher", "ce", student="untrained", init="random")
        write_found(write, "teacher", found, sizes)
        keep_teacher(folder, sizes)


def seconds_of_training(left: float, task) -> float:
    return 1.0 if task.tiny else max(left, 10.0)


def start_ranks():
    """Once a process, and after everything that forks: CUDA does not survive a fork."""
    from ted_scale.ranks.group import start_ranks

    device = start_ranks()
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage at every engine's start; imported modules are none
    return device


def write_corpus(folder: Path, sizes: Sizes) -> None:
    text, tokenizer, shards = folder / "text.jsonl", folder / "tokenizer", folder / "shards"
    if not text.exists():
        write_text(text, sizes)
    if not tokenizer.exists():
        words = ["--vocab-size", sizes.vocabulary, "--sample-mb", 5, "--out", tokenizer, text]
        train_tokenizer.main([str(word) for word in words])
    if not (shards / "python.idx").exists():
        tokenize_corpus.main(["--tokenizer", str(tokenizer), "--out", str(shards / "python"), str(text)])
    if not (folder / "untrained").exists():
        words = ["--family", "llama", "--tokenizer", str(tokenizer), "--out", str(folder / "untrained")]
        new_model.main([*words, "--set", *sizes.model])


def write_text(text: Path, sizes: Sizes) -> None:
    """As many files of installed packages as needed; a rehearsal reads the standard library, which is faster to find."""
    library = Path(sysconfig.get_path("stdlib" if sizes is TINY else "purelib"))
    chosen, size = [], 0
    for name in demo.source_names(library):
        if (library / name).is_file() and size < 1.05 * sizes.text:
            chosen.append(name)
            size += (library / name).stat().st_size
    demo.write_sources(library, chosen, text, sizes.text)


def keep_teacher(folder: Path, sizes: Sizes) -> None:
    export_hf.main([str(folder / "runs" / "teacher"), str(folder / "teacher")])
    cut_student.main([str(folder / "teacher"), str(folder / "student"), "--keep", sizes.keep])


def students(task, write) -> None:
    """If no teacher is left from an earlier call, half of the time trains one."""
    folder, sizes = task.work / "learning", TINY if task.tiny else FULL
    task.device()
    prepare(task, write, task.limit / 2)
    device = start_ranks()
    seconds = seconds_of_training(0.7 * task.left / len(ARMS) - 5, task)
    for name, sections in ARMS.items():
        settings = {"method": name, **sections}
        try:
            write_found(write, name, train_for(folder, sizes, device, seconds, name, **settings), sizes)
        except Exception as error:  # of one method; the others still run
            write("held-out loss", arm=name, status="failed", reason=f"{type(error).__name__}: {error}")


def write_found(write, arm: str, found: dict, sizes: Sizes) -> None:
    where = {"arm": arm, "sizes": f"{sizes.tokens_per_step} tokens a step of {sizes.seq_len}, V={sizes.vocabulary}"}
    for figure, (value, unit) in found.items():
        write(figure, value, unit, **where)


def train_for(folder: Path, sizes: Sizes, device, seconds: float, name: str, method: str, **more) -> dict:
    """Train about that long; results by figure: (value, unit)."""
    each = seconds_a_step(folder, sizes, device, name, method, **more)
    steps = min(max(int(seconds / each), LEAST_STEPS), sizes.most_steps)
    rows = trained(run_of(folder, sizes, name, method, steps, **more), device)
    losses = [row for row in rows if "val/loss" in row]
    rate = statistics.median(row["perf/tokens_per_s"] for row in rows if "perf/tokens_per_s" in row)
    return {
        "held-out loss before": (losses[0]["val/loss"], "nats"),
        **({"teacher's": (losses[0]["val/teacher_loss"], "nats")} if "val/teacher_loss" in losses[0] else {}),
        "held-out loss": (losses[-1]["val/loss"], "nats"),
        "training": (sum(milliseconds(rows)) / 1e3, "s"),
        "steps": (steps, ""),
        "tokens/s": (rate, ""),
    }


def seconds_a_step(folder: Path, sizes: Sizes, device, name: str, method: str, **more) -> float:
    """From a run of a few steps; the first ones allocate and compile."""
    run = run_of(folder, sizes, f"{name}-speed", method, LEAST_STEPS if sizes is TINY else SPEED_STEPS, **more)
    spent = milliseconds(trained(run, device))
    shutil.rmtree(run.folder)
    return statistics.median(spent[len(spent) // 4 :]) / 1e3


def milliseconds(rows: list[dict]) -> list[float]:
    """Of every step, for `log_every` is 1."""
    return [row["perf/step_ms"] for row in rows if "perf/step_ms" in row]


def run_of(
    folder: Path, sizes: Sizes, name: str, method: str, steps: int, student="student", init="weights", loss=()
) -> Run:
    values = {
        "name": name, "method": method, "runs": str(folder / "runs"), "ds_config": str(ZERO3), "log_every": 1,
        "student": {"path": str(folder / student), "init": init},
        "teacher": {"path": str(folder / "teacher")} if method != "ce" else None,
        "data": {"seq_len": sizes.seq_len, "attention": "document",
                 "corpora": [{"path": str(folder / "shards"), "validation": 0.02}]},
        "pairs": {"explicit": list(enumerate(map(int, sizes.keep.split(","))))},  # block k began as this one
        "filters": {"steps": 0},  # filters start from the teacher's states; measurements showed no gain of stage I
        "loss": dict(loss),
        "train": {"steps": steps, "tokens_per_step": sizes.tokens_per_step, "micro_batch": sizes.micro_batch, "lr": 1e-3,
                  "min_lr": 1e-4, "warmup_steps": steps // 20},
        "validation": {"tokens": sizes.validation},
        "checkpoint": {"every": 1_000_000, "keep": 1},
    }  # fmt: skip
    return Run.model_validate(values)


def trained(run: Run, device) -> list[dict]:
    """The run's rows; an earlier run of this name is removed first."""
    from ted_scale.plan import make_plan
    from ted_scale.run import train_run

    shutil.rmtree(run.folder, ignore_errors=True)
    train_run(make_plan(run, 1), device)
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
