"""Counts the files that a reader goes through on three journeys of a run: `python tools/bench/journeys.py [--verbose]`.

(a) a batch from disk to weights: one step of TED's stage II, from the request for its micro-batches to the decision after it
(b) a checkpoint: the call of save in train.py, the thread that writes, the thread that copies
(c) SIGTERM to an exit code: the thread that reads the signal, and the main thread from the step at which the guard sees it.
    The save that follows is one entry, "save"

This watches a real run through sys.setprofile: one rank, one micro-batch a step, one block a model (so one pair), documents
apart. An entry is a call of a function in a file of ted_scale, whether by name, as a hook or by autograd; a return to the caller
is not an entry. A journey consists of parts, one for each thread: (a) has the reader's part, then the main thread's. A part
begins with the file that its thread is in. Parts are joined in order, and an entry into the file of the entry before is
dropped. Of what remains, `files` counts the distinct files and `returns` the entries into a file that was entered before. The
third number counts the returns if every loop runs once (`once_a_loop`). A generator counts once: when it starts, or, if it was
started before the journey, when it continues. Comprehensions and lambdas belong to their line. A package's __init__.py counts
when a function in it is called.
"""

import argparse
import inspect
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import transformers

import ted_scale
from ted_scale.base.errors import RESUME
from ted_scale.base.exits import run_main
from ted_scale.checkpoints.copier import Copier
from ted_scale.checkpoints.saver import Saver
from ted_scale.config.run import Run
from ted_scale.data.loader import Loader
from ted_scale.health.guard import Guard
from ted_scale.metrics.metrics import Metrics
from ted_scale.plan import Plan, make_plan
from ted_scale.ranks import signals
from ted_scale.run import run_plan, save_checkpoint
from ted_scale.train import train
from tools.bench.gpu_step import ZERO3, write_corpus
from tools.bench.object_server import serving

PACKAGE = f"{Path(ted_scale.__file__).parent}{os.sep}"
SEQ_LEN, VOCABULARY = 1024, 128  # more than a document
EVERY, BATCH, CHECKPOINT, SIGNAL = 4, 10, 12, 14  # steps: of the saves, and of the journeys
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}


class Event(NamedTuple):
    thread: str
    kind: str  # call, return
    function: object  # its code
    again: bool  # a generator continues


log: list[Event] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="the files, too, in their order")
    verbose, folder = parser.parse_args().verbose, Path(tempfile.mkdtemp())
    leave = os._exit

    def ended(code: int) -> None:
        """Replaces os._exit."""
        sys.setprofile(None)
        if code == RESUME:
            print("\n".join(report(code, verbose)), flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        leave(0 if code == RESUME else code)

    with serving() as endpoint:
        endpoint.client().create_bucket(Bucket="bucket")
        plan, os._exit = plan_of(folder), ended
        run_main(lambda: watched(plan))


def plan_of(folder: Path) -> Plan:
    for side in ("teacher", "student"):
        transformers.LlamaConfig(vocab_size=VOCABULARY, **SIZES).save_pretrained(folder / side)
    write_corpus(folder / "corpus", VOCABULARY, 100 * SEQ_LEN)
    run = {
        "name": "journeys", "method": "ted", "runs": str(folder / "runs"), "ds_config": str(ZERO3),
        "student": {"path": str(folder / "student"), "init": "random"},
        "teacher": {"path": str(folder / "teacher"), "init": "random"},
        "data": {"seq_len": SEQ_LEN, "attention": "document", "corpora": [{"path": str(folder / "corpus")}]},
        "train": {"steps": 100, "tokens_per_step": SEQ_LEN, "micro_batch": 1, "lr": 1e-3},
        "checkpoint": {"every": EVERY, "background": True, "copy_to": "s3://bucket"},
    }  # fmt: skip
    return make_plan(Run.model_validate(run), 1)


def watched(plan: Plan) -> None:
    threading.setprofile(note)
    sys.setprofile(note)
    signals.listen()
    run_plan(plan)


def note(frame, kind: str, _) -> None:
    """The profile function of every thread."""
    code = frame.f_code
    if kind not in ("call", "return") or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
        return
    if kind == "call" and code is Metrics.timed.__code__:
        wait_for_threads()
    again = bool(code.co_flags & inspect.CO_GENERATOR and code.co_code[frame.f_lasti + 1])  # RESUME's argument
    log.append(Event(threading.current_thread().name, kind, code, again))
    if kind == "call" and code is Guard.gather.__code__ and len(calls(Guard.gather)) == SIGNAL:
        os.kill(os.getpid(), signal.SIGTERM)
        signals.asked.wait(10)


def wait_for_threads() -> None:
    """Before a step, so that no thread of a save runs during it."""
    begun = {thread_of(f) for f in (Saver.run_thread, Copier.run_thread) if calls(f)}
    while any(thread.name in begun for thread in threading.enumerate()):
        time.sleep(0.01)


def calls(function) -> list[int]:
    """The indices of its calls in the log."""
    return [i for i, event in enumerate(log) if event.kind == "call" and event.function is function.__code__]


def thread_of(function) -> str:
    return log[calls(function)[0]].thread


def report(code: int, verbose: bool) -> list[str]:
    journeys = {
        "(a) batch": batch(),
        "(b) checkpoint": checkpoint(),
        f"(c) signal, exit code {code}": ended_by_signal(),
    }
    lines = []
    for name, visits in journeys.items():
        files = list(dict.fromkeys(visits))
        once = len(once_a_loop(visits)) - len(files)
        lines.append(
            f"{name}: {len(files)} files, {len(visits) - len(files)} returns, {once} with loops gone through once"
        )
        lines += [f"    {' > '.join(visits)}"] * verbose
    return lines


def batch() -> list[str]:
    asked = calls(Metrics.timed)[BATCH - 1]
    told = next(i for i in calls(Metrics.add) if i > asked)
    read = next(i for i in calls(Loader._read) if i > asked)
    reader = entries(read, end_of(read), thread_of(Loader._read))
    return joined(reader, [file_of(train.__code__)], entries(asked, told, thread_of(train)))


def checkpoint() -> list[str]:
    begun = calls(save_checkpoint)[CHECKPOINT // EVERY - 1]
    after = next(i for i in calls(Metrics.timed) if i > begun)
    threads = [entries(begun, after, thread_of(f)) for f in (Saver.run_thread, Copier.run_thread)]
    return joined([file_of(train.__code__)], entries(begun, end_of(begun), thread_of(save_checkpoint)), *threads)


def ended_by_signal() -> list[str]:
    seen, saved = calls(Guard.gather)[SIGNAL - 1], calls(save_checkpoint)[-1]
    heeding, main = thread_of(signals.read_signals), thread_of(train)
    heed = [file_of(signals.read_signals.__code__), *entries(seen, len(log), heeding)]
    ways = entries(seen, saved, main), ["save"], entries(end_of(saved), len(log), main)
    return joined(heed, [file_of(train.__code__)], *ways)


def end_of(call: int) -> int:
    """The index at which the function called at `call` returns."""
    event = log[call]._replace(kind="return")
    return next(i for i in range(call, len(log)) if log[i] == event)


def entries(first: int, end: int, thread: str) -> list[str]:
    """The files that a thread enters from `first` up to `end`."""
    entered, files = set(), []
    for event in log[first:end]:
        if event.thread == thread and event.kind == "call" and not (event.again and event.function in entered):
            entered.add(event.function)
            files.append(file_of(event.function))
    return files


def joined(*parts: list[str]) -> list[str]:
    return [name for name, _ in groupby(name for part in parts for name in part)]


def once_a_loop(visits: list[str]) -> list[str]:
    """Drop immediate repetitions, the shortest first: a loop over tensors or files is read once."""
    for size in range(1, len(visits) // 2 + 1):
        for i in range(len(visits) - 2 * size + 1):
            if visits[i : i + size] == visits[i + size : i + 2 * size]:
                return once_a_loop(visits[:i] + visits[i + size :])
    return visits


def file_of(code) -> str:
    return code.co_filename.removeprefix(PACKAGE)


if __name__ == "__main__":
    main()
