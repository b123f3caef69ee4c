"""`ted-scale supervise` over a launcher that only looks like one: what it does each time it is started stands in a file.

`python tests/harness/supervised.py FOLDER RUNFILE SUPERVISE-OPTION…` supervises `… supervised.py launch FOLDER …`. Every line of
FOLDER/lives is a life of the run: the exit code it ends with, and the newest checkpoint's step by then; `wait` stands for
ranks that work until a signal tells them to save (75), `stubborn` for ones that hear none, `orphans` for a launcher that
is killed above ranks that work on.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ted_scale.commands import supervise


def launch(folder: Path) -> int:
    kind, step = next_life(folder)
    write(folder / "started", f"{time.monotonic()}\n", "a")
    write(folder / "step", step)
    if kind.isdigit():
        return int(kind)
    rank = [sys.executable, __file__, "rank", str(folder), kind]
    ranks = [subprocess.Popen([*rank, f"--local_rank={local}"]) for local in (0, 1)]
    if kind == "orphans":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return max(rank.wait() for rank in ranks)


def next_life(folder: Path) -> list[str]:
    first, *others = (folder / "lives").read_text().splitlines()
    write(folder / "lives", "".join(f"{line}\n" for line in others))
    return first.split()


def rank(folder: Path, kind: str) -> int:
    heard = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if kind == "stubborn" else lambda number, _: heard.append(number))
    write(folder / "pids", f"{os.getpid()}\n", "a")
    end = time.monotonic() + (1.0 if kind == "orphans" else 60)
    while not heard and time.monotonic() < end:
        time.sleep(0.02)
    with contextlib.suppress(IndexError):
        write(folder / "heard", f"{signal.Signals(heard[0]).name}\n", "a")
    return 75


def write(path: Path, text: str, mode: str = "w") -> None:
    with path.open(mode) as file:
        file.write(text)


def main() -> None:
    if sys.argv[1] in ("launch", "rank"):
        sys.exit(launch(Path(sys.argv[2])) if sys.argv[1] == "launch" else rank(Path(sys.argv[2]), sys.argv[3]))
    folder, config = Path(sys.argv[1]), sys.argv[2]
    supervise.step_of = lambda run: int((folder / "step").read_text())
    supervise.is_done = lambda run: supervise.step_of(run) == 9
    command = [sys.executable, __file__, "launch", str(folder), "--config", config]
    sys.argv[1:] = [*sys.argv[3:], "--", *command]
    supervise.run_main(supervise.main)


if __name__ == "__main__":
    main()
