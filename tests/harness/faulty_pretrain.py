"""launch/pretrain.py with a fault in it: `FAULT=hang:1:7 deepspeed tests/harness/faulty_pretrain.py …` hangs rank 1 in step 7."""

import importlib.util
import os
import signal
import sys
import time

from places import ROOT

sys.path.insert(0, str(ROOT))

spec = importlib.util.spec_from_file_location("pretrain", ROOT / "launch" / "pretrain.py")
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)


def fall_over(kind: str) -> None:
    if kind == "hang":
        time.sleep(3600)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("what really went wrong")


def put_fault_in(kind: str, rank: str, step: str) -> None:
    from ted_scale.health.guard import Guard

    gather = Guard.gather

    def gather_faultily(self, progress):
        if (os.environ["RANK"], str(progress.step + 1)) == (rank, step):
            fall_over(kind)
        gather(self, progress)

    Guard.gather = gather_faultily


put_fault_in(*os.environ["FAULT"].split(":"))
pretrain.run_main(pretrain.main)
