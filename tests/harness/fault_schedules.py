"""Random schedules of faults for what a run does with files, without engines: it saves, resumes, copies and reads.

`python tests/harness/fault_schedules.py KIND FOLDER FIRST LAST`, with faulty_files.c loaded, runs the schedules of these seeds.
It prints one line of JSON a seed: what was wrong (null: nothing), how often a rule struck, and how the lives ended. What
must hold after each life stands in the module of its kind.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import faulty_files
from faulty_files import Faults
from faulty_store import Store


def main() -> None:
    kind, folder, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if not faulty_files.is_loaded():
        sys.exit("LD_PRELOAD must name faulty_files.so, but does not; start this through tests/test_schedules.py")
    if kind == "reading":
        import schedules_of_reads as schedules
    else:
        import schedules_of_saves as schedules
    store = [Store(int(os.environ["FAULTY_STORE"]))] if kind == "copying" else []
    for seed in range(first, last):
        place, began = folder / f"{kind}_{seed}", time.perf_counter()
        faults = Faults(place / "faults")
        wrong, ends = schedules.run(seed, place, faults, *store)
        seconds = round(time.perf_counter() - began, 3)
        report = {"seed": seed, "wrong": wrong, "struck": faults.log(), "ends": ends, "s": seconds}
        print(json.dumps(report), flush=True)
        if not wrong:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
