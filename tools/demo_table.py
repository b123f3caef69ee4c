"""The demo's last table, read from files of the runs: metrics.jsonl, config.json and safetensors headers.

It knows nothing about how the demo runs. demo.py prints and saves what `render` returns.
"""

import json
import math
import statistics
from pathlib import Path

from ted_scale.config.run import Run
from ted_scale.config.run_file import load_run
from ted_scale.storage import tensor_file


def render(teacher_config: Path, ted_config: Path, student: Path, sample: Path, table: Path) -> str:
    teacher, ted = load_run(teacher_config), load_run(ted_config)
    return "\n".join(
        [*losses(teacher, ted, student), "", *speeds(teacher, ted), "", *places(teacher, ted, student, sample, table)]
    ) + "\n"  # fmt: skip


def losses(teacher: Run, ted: Run, student: Path) -> list[str]:
    """Validation of all three models on one text, from stage II's first and last validation."""
    rows = [row for row in read_rows(ted) if "val/loss" in row]
    before, after, best = rows[0]["val/loss"], rows[-1]["val/loss"], rows[0]["val/teacher_loss"]
    closed = (before - after) / (before - best)
    sizes = {"teacher": parameters(Path(ted.teacher.path)), "student": parameters(student)}
    lines = [f"{'held-out text':<34}{'parameters':>12}{'val loss':>10}{'perplexity':>12}"]
    for name, side, loss, ppl in (
        ("teacher", "teacher", best, rows[0]["val/teacher_ppl"]),
        ("student before (cut from teacher)", "student", before, rows[0]["val/ppl"]),
        ("student after TED", "student", after, rows[-1]["val/ppl"]),
    ):
        lines.append(f"{name:<34}{sizes[side]:>12,}{loss:>10.4f}{ppl:>12.2f}")
    return [*lines, f"TED closed {closed:.0%} of the cut student's gap to its teacher ({before - after:.4f} nats)"]


def speeds(teacher: Run, ted: Run) -> list[str]:
    first = ted.filters.steps
    rows = read_rows(ted)
    parts = {
        f"teacher, {teacher.method}": read_rows(teacher),
        "TED stage I, filters": [row for row in rows if row["step"] <= first],
        "TED stage II, student": [row for row in rows if row["step"] > first],
    }
    lines = [f"{'training':<34}{'steps':>12}{'tokens':>10}{'tokens/s':>12}{'peak GiB a rank':>18}"]
    for name, part in parts.items():
        timed = [row for row in part if "perf/tokens_per_s" in row]
        rate = statistics.harmonic_mean([row["perf/tokens_per_s"] for row in timed])
        run = teacher if part is parts[f"teacher, {teacher.method}"] else ted
        steps = timed[-1]["step"] - (first if name.startswith("TED stage II") else 0)
        peak = max(row["memory/peak_gib"] for row in timed)
        lines.append(f"{name:<34}{steps:>12,}{steps * run.train.tokens_per_step:>10,}{rate:>12,.0f}{peak:>18.2f}")
    return lines


def places(teacher: Run, ted: Run, student: Path, sample: Path, table: Path) -> list[str]:
    where = {
        "teacher, Hugging Face folder": ted.teacher.path,
        "student, Hugging Face folder": student,
        "runs: numbers, log, checkpoints": f"{teacher.folder}, {ted.folder}",
        "what the student wrote": sample,
        "report, to look at in a browser": table.with_name("report.html"),
        "this table": table,
    }
    return [
        *(f"{what:<34}{path}" for what, path in where.items()),
        "",
        f"curves in the terminal:  wandb leet {ted.folder}/wandb",
        "the same student without a teacher, to compare val/loss with:",
        "  deepspeed --num_gpus 2 launch/pretrain.py --config launch/runs/demo_ted.toml --set name=ce --set method=ce",
        "start over:  rm -r runs/demo && make demo",
    ]


def read_rows(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def parameters(folder: Path) -> int:
    """Elements in a model folder's files; a tied weight is saved once."""
    headers = map(tensor_file.header_of, folder.glob("*.safetensors"))
    return sum(math.prod(entry.shape) for header in headers for entry in header.entries.values())
