"""From text to an exported model on two CPU ranks, without downloads: python tools/demo.py (`make demo` runs it)

Text of this machine's Python library, tokenizer, shards, a teacher from scratch, a student cut from it, TED's two
stages, export, a few generated lines, a report, one table. All by the commands that a user types, all under runs/demo. A phase
whose result exists is skipped. A phase that runs first removes what later phases made from its old result. So an
interrupted demo continues where it was, and never mixes the results of two demos.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, its parent is not

from ted_scale.base.durable import write_durably
from ted_scale.base.errors import RunStopped, UserError
from ted_scale.base.exits import run_main
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import read_progress
from ted_scale.commands.comparison.sessions import end_session
from ted_scale.config.run_file import load_run
from tools import demo_table

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path("runs/demo")
TEACHER, TED = Path("launch/runs/demo_teacher.toml"), Path("launch/runs/demo_ted.toml")
TEXT, TOKENIZER, SHARDS = DEMO / "text.jsonl", DEMO / "tokenizer", DEMO / "shards"
UNTRAINED, TEACHER_HF, CUT, STUDENT_HF = (DEMO / n for n in ("untrained", "teacher_hf", "student_cut", "student_hf"))
SAMPLE, REPORT, TABLE, LOCK = DEMO / "sample.txt", DEMO / "report.html", DEMO / "table.txt", DEMO / ".lock"
TED_SCALE = (sys.executable, "-m", "ted_scale.commands")  # `ted-scale`, installed or not
RANKS = 2
TEXT_BYTES = 8_000_000
# Not text to learn from, or not installed everywhere. Encodings are copies of each other and would leak into validation.
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "encodings"}
SHAPE = ["hidden_size=192", "num_hidden_layers=6", "num_attention_heads=4", "num_key_value_heads=4",
         "intermediate_size=512", "max_position_embeddings=512", "initializer_range=0.06", "tie_word_embeddings=true"]  # fmt: skip
STUDENT_BLOCKS = 3
PROMPTS = ['def read_file(path):\n    """', "import os\nimport ", "class Error(Exception):\n"]


class Phase(NamedTuple):
    title: str
    result: Path
    run: Callable[[], None]
    done: Callable[[], bool]


def phase(title: str, result: Path, run: Callable[[], None], done: Callable[[], bool] | None = None) -> Phase:
    """By default done when its result exists, because most results are renamed when they are complete."""
    return Phase(title, result, run, done or result.exists)


def phases() -> list[Phase]:
    return [
        phase("text of the Python standard library", TEXT, collect_text),
        phase("sentencepiece tokenizer", TOKENIZER, tool("train-tokenizer", "--vocab-size", 4096, "--out", TOKENIZER, TEXT)),
        phase("token shards", SHARDS, tool("tokenize", "--tokenizer", TOKENIZER, "--out", SHARDS / "python", TEXT),
              (SHARDS / "python.idx").exists),
        phase("untrained teacher", UNTRAINED, tool("new-model", "--family", "llama", "--tokenizer", TOKENIZER,
              "--out", UNTRAINED, "--set", *SHAPE)),
        phase("teacher, pre-trained from scratch", DEMO / "teacher", trainer(TEACHER), lambda: trained(TEACHER)),
        phase("teacher as a Hugging Face folder", TEACHER_HF, tool("export", DEMO / "teacher", TEACHER_HF)),
        phase("student cut from the teacher", CUT, tool("cut-student", TEACHER_HF, CUT, "--layers", STUDENT_BLOCKS)),
        phase("TED: stage I learns filters, stage II distils", DEMO / "ted", trainer(TED), lambda: trained(TED)),
        phase("student as a Hugging Face folder", STUDENT_HF, tool("export", DEMO / "ted", STUDENT_HF)),
        phase("text written by the student", SAMPLE, write_sample),
        phase("the report, one page", REPORT, tool("report", DEMO / "ted", "--out", REPORT)),
    ]  # fmt: skip


def tool(name: str, *arguments) -> Callable[[], None]:
    return lambda: start(*TED_SCALE, name, *arguments)


def trainer(config: Path) -> Callable[[], None]:
    return lambda: start("deepspeed", "--quiet", "--num_gpus", RANKS, "launch/pretrain.py", "--config", config)


def start(*command) -> None:
    """Run one command in the foreground, shown as a user would type it."""
    words = [str(word) for word in command]
    typed = ["ted-scale", *words[3:]] if command[:3] == TED_SCALE else words
    print("$ " + " ".join(typed), flush=True)
    process = subprocess.Popen(
        words, env=environment(), pass_fds=[lock.fileno() for lock in held], start_new_session=True
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        end_session(process)
        raise RunStopped("the demo was interrupted; `make demo` continues from here") from None
    if code:
        raise RunStopped(f"the demo needs every phase, but {' '.join(typed[:2])} exited with code {code}; see above")


def environment() -> dict[str, str]:
    """This interpreter's deepspeed and ninja first. The ranks share the cores; torch would use all of them in each."""
    threads = max(1, len(os.sched_getaffinity(0)) // RANKS)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "DS_ACCELERATOR": "cpu", "PATH": path}


def trained(config: Path) -> bool:
    from ted_scale.distill.stages import stages_of

    run = load_run(config)
    newest = files.newest_checkpoint(run.folder)
    return newest is not None and read_progress(newest).step >= stages_of(run)[-1].last_step


def collect_text() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    write_sources(library, source_names(library), TEXT, TEXT_BYTES)


def source_names(library: Path) -> list[Path]:
    """Ordered by a hash, so that the held-out end has every kind of file."""
    names = [path.relative_to(library) for kind in ("py", "txt", "rst") for path in library.rglob(f"*.{kind}")]
    names = [name for name in names if not LEFT_OUT & set(name.parts)]
    return sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())


def write_sources(library: Path, names: list[Path], text: Path, limit: int) -> None:
    """One document a source file, as many as fit into `limit` characters."""
    part, size, count = text.with_suffix(".part"), 0, 0
    with part.open("w", encoding="utf-8") as file:
        for name in names:
            source = (library / name).read_bytes().decode("utf-8", errors="replace")
            if size + len(source) <= limit:
                file.write(json.dumps({"text": source, "source": name.as_posix()}) + "\n")
                size, count = size + len(source), count + 1
    if size < limit // 4:
        raise UserError(f"the Python library must hold {limit // 4:,} characters of source, but {library} holds "
                        f"{size:,}; use another Python")  # fmt: skip
    part.rename(text)
    print(f"{count:,} files, {size:,} characters of {library} -> {text}")


def write_sample() -> None:
    """Text of the exported student; what it and its teacher wrote in training is in samples.jsonl."""
    texts = written_by(STUDENT_HF)
    write_durably(SAMPLE, "\n----\n".join(texts) + "\n")
    print(SAMPLE.read_text(encoding="utf-8"))


def written_by(folder: Path) -> list[str]:
    """A text for each prompt, by a model that is loaded as any user would load it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=True,
                                 temperature=0.7, top_k=40)  # fmt: skip
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    return texts


def claim_folder() -> None:
    """One demo at a time. The commands that it starts hold the lock too, so one that outlives it counts as well."""
    DEMO.mkdir(parents=True, exist_ok=True)
    held.append(LOCK.open("w"))
    try:
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{DEMO} must be used by one demo at a time, but another runs in it; wait for it") from None


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a signal to the demo also ends the command it waits for
    claim_folder()
    began, todo = time.perf_counter(), phases()
    for number, (title, result, run, done) in enumerate(todo, 1):
        minutes, seconds = divmod(int(time.perf_counter() - began), 60)
        skipped = done()
        print(
            f"\n[{number}/{len(todo)}] {minutes}:{seconds:02d} {title}" + (f": done, {result}" if skipped else ""),
            flush=True,
        )
        if not skipped:
            for path in [*(later.result for later in todo[number:]), TABLE]:
                remove(path)
            run()
    table = demo_table.render(TEACHER, TED, STUDENT_HF, SAMPLE, TABLE)
    write_durably(TABLE, table)
    print(f"\n{table}")


held: list = []

if __name__ == "__main__":
    run_main(main)
