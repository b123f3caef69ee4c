"""A rank's other threads while it reads a file whose file server pauses.

`python tests/harness/stalled_reads.py FILE` reads FILE's tensors in the main thread, and prints how long that took and for how
long another thread, which wants to run every 10 ms, stood still. The pauses are those of faulty_files.py.
"""

import sys
import threading
import time
from pathlib import Path

import torch

from ted_scale.storage import tensor_file
from ted_scale.storage.tensor_file import Stretch

runs: list[float] = []


def run_often() -> None:
    while True:
        runs.append(time.monotonic())
        time.sleep(0.01)


def main() -> None:
    file = Path(sys.argv[1])
    target = torch.zeros(1000)
    threading.Thread(target=run_often, daemon=True).start()
    time.sleep(0.1)
    began = time.monotonic()
    tensor_file.fill(file, lambda entries: [Stretch(key, 0, target) for key in entries])
    ended = time.monotonic()
    assert target.sum() == 1000
    longest = max(b - a for a, b in zip(runs, [*runs[1:], ended], strict=True))
    print(ended - began, longest)


if __name__ == "__main__":
    main()
