"""What each command of the documents reads, made tiny where the command looks for it; and which commands nobody can run here.

Note: a command's words stay as they are. When its parser has taken them, what they name is made at that place, and sizes that
a tiny model does not have are replaced in what was parsed. So a command of ted-scale needs a line in READS and nothing else.
"""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from chats import MARKED
from hollow import CUTS, MODELS, make_hollow_model, make_inputs
from places import ROOT
from tiny import make_model, make_run, pretrain, write_run

from ted_scale.checkpoints.filters_file import write_filters
from ted_scale.commands import tokenize_corpus, train_tokenizer
from ted_scale.config.run import Run
from ted_scale.config.run_file import load_run
from ted_scale.plan import plan_of_models

EXAMPLE = "launch/runs/llama3_8b_to_1b.toml"
ONLY_PARSED = {  # the beginning of a command, and why no test runs it
    "make": "installs packages, in tests/test_soak_newcomer.py, or is the suite",
    "pip": "installs packages",
    "pytest": "is a part of this suite",
    "python -m pytest": "is a part of this suite",
    "python -m lm_eval": "is another program",
    "jq": "is another program",
    "python - ": "its program is compiled; it reads what the line before it downloads",
    "python tools/smollm2.py": "downloads a model; tests/tools/test_smollm2.py",
    "python tools/evaluation/olmes.py": "reads a package that pip downloads; tests/commands/test_evaluate.py",
    "python tools/bench/": "measures for minutes",
    "deepspeed --num_gpus 2 tools/bench/": "measures for minutes",
    "python tests/harness/": "is a part of this suite",
    "deepspeed --num_gpus 8 --module ted_scale.commands.plan": "measures for a minute on 8 ranks",
    "deepspeed --hostfile hosts --module ted_scale.commands.plan": "measures for a minute on several machines",
    **dict.fromkeys(("apt-get", "dpkg-deb", "git", "hf", "npm", "wandb"), "needs a network"),
    **dict.fromkeys((".", "cat", "cd", "cp", "export", "mkdir", "rm", "tar", "unzip"), "is the shell's"),
    "cc": "is the compiler; tests/test_faulty_files.py",
}
RUN_ELSEWHERE = {"goodput": "tests/commands/test_goodput.py"}  # as the document has it, with what it prints
READS: dict[str, dict[str, str]] = {  # by command: which of its arguments name what
    "doctor": {"folder": "any_folder", "hostfile": "hosts"},
    "init": {"teacher": "model", "text": "texts"},
    "train-tokenizer": {"inputs": "texts"},
    "task": {"data": "reviews", "held_out": "reviews"},
    "tokenize": {"tokenizer": "model", "inputs": "texts"},
    "inspect": {"path": "corpus"},
    "new-model": {"tokenizer": "model"},
    "cut-student": {"teacher": "model", "text": "corpus"},
    "checkpoints": {"run": "run"},
    "report": {"runs": "run"},
    "export": {"source": "run"},
    "evaluate": {"models": "model", "corpora": "corpus"},
    "wandb-workspace": {"run": "run"},
    "completion": {},
}
# Models that no run file names; all others stand for a cut SmolLM2.
STANDS_FOR = {"models/few_teacher_untrained": "models/few_teacher"}
TINY = {  # instead of sizes that only a real model or machine has
    "cut-student": {"layers": 2, "keep": "0,3", "hidden": 16, "ffn": 32, "heads": 2, "kv_heads": 1, "tokens": 256,
                    "seq_len": 32, "device": "cpu"},
    "train-tokenizer": {"vocab_size": 400},
    "evaluate": {"tokens": 256, "seq_len": 32},
    "doctor": {"folder": Path("folder"), "ranks": 1},
    "init": {"ranks": 1},
}  # fmt: skip


def make_world(root: Path) -> Path:
    """One tokenizer, model, corpus and run of two steps, of which all commands get copies. The run trains adapters and keeps a best
    checkpoint, because an export may ask for either."""
    (root / "texts").mkdir(parents=True)
    for page in sorted((ROOT / "docs").glob("*.md")):
        shutil.copy(page, root / "texts")
    train_tokenizer.main(["--vocab-size", "400", "--out", str(root / "teacher"), str(root / "texts")])
    make_model(root / "teacher", "llama", vocab_size=400)
    tokenize_corpus.main(["--tokenizer", str(root / "teacher"), "--out", str(root / "corpus"), str(root / "texts")])
    config = root / "teacher/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": MARKED}))
    (root / "student").symlink_to(root / "teacher")
    sections = {
        "train": {"steps": 2, "tokens_per_step": 32}, "filters": {"steps": 0}, "checkpoint": {"every": 1, "keep_best": True},
        "student": {"lora": {"rank": 2}}, "wandb": {"project": "documents", "mode": "offline"},
    }  # fmt: skip
    done = pretrain("--config", write_run(root / "run.toml", make_run(root, **sections)))
    assert done.returncode == 0, done.stderr[-2000:]
    return root


class Place:
    """A fresh folder in which one command finds what it names."""

    def __init__(self, folder: Path, world: Path | None = None):
        self.folder, self.world = folder, world
        folder.mkdir()
        shutil.copytree(ROOT / "launch", folder / "launch")
        (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
        (folder / "FILE").symlink_to(ROOT / "ds_configs/zero3.json")

    def model(self, path: Path) -> None:
        self._linked(self.world / "teacher", path)

    def corpus(self, path: Path) -> None:
        for end in (".bin", ".idx", ".json"):
            self._linked(self.world / f"corpus{end}", Path(f"{path}{end}"))

    def run(self, path: Path) -> None:
        """Of one of its checkpoints, too: a copy, because a run's files are no links."""
        path = path.parents[1] if path.parent.name == "checkpoints" else path
        if not path.exists():
            shutil.copytree(self.world / "runs/tiny", path)

    def run_file(self, path: Path) -> None:
        """One of launch/, with hollow models and corpora; another name stands for one of them."""
        if not path.exists():
            shutil.copy(ROOT / EXAMPLE, path)
        self.hollow(load_run(path))

    def hollow(self, run: Run) -> None:
        """A student that only commands make is as large as one of a run file."""
        for model in filter(None, (run.student, run.teacher)):
            if model.path not in MODELS | CUTS:
                self._linked(
                    make_hollow_model(self.folder, STANDS_FOR.get(model.path, "models/smollm2_third")), Path(model.path)
                )
        make_inputs(self.folder, run)
        if run.filters.from_run:
            self.hollow_filters(run)

    def hollow_filters(self, run: Run) -> None:
        """As the other run's stage I names them, without a tensor."""
        plan = plan_of_models(run, world=1)
        plan.filters_file.parent.mkdir(parents=True, exist_ok=True)
        write_filters(plan.filters_file, {}, plan.filters_identity())

    def plan(self, path: Path) -> None:
        if not path.exists():
            shutil.copy(ROOT / "launch/plans/smollm2_third.toml", path)

    def texts(self, path: Path) -> None:
        """A folder, or a file of the kind that its name says."""
        rows = [{"text": page.read_text(encoding="utf-8")} for page in (self.world / "texts").iterdir()]
        chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]
        pair = {"prompt": "Which?", "completion": " This one."}  # of ted-scale task
        made = {"messages": chat} if "chat" in str(path) else pair if path.name in ("train.jsonl", "all.jsonl") else {}
        lines = "".join(json.dumps(made or row) + "\n" for row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix == ".zst":
            path.write_bytes(zstandard.compress(lines.encode()))
        elif path.suffix:
            path.write_text(lines)
        else:
            self._linked(self.world / "texts", path)

    def reviews(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        """With the columns of SST-2 and of SciQ, both of which documents name."""
        sciq = {
            "support": "",
            "correct_answer": "blue",
            "distractor1": "red",
            "distractor2": "green",
            "distractor3": "grey",
        }
        rows = [
            json.dumps({"sentence": f"film {n} of {path}", "label": n % 2, "question": f"colour {n}?", **sciq}) + "\n"
            for n in range(40)
        ]
        (path / "rows.jsonl").write_text("".join(rows))

    def any_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def hosts(self, path: Path) -> None:
        path.write_text("node1 slots=8\n")

    def _linked(self, source: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.symlink_to(source)
