"""Train the run of a run file: `deepspeed launch/pretrain.py --config launch/runs/NAME.toml [--set section.key=value]`.

It is what `ted-scale pretrain` does, from a checkout, installed or not: ted_scale/commands/pretrain.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ted_scale.base.exits import run_main
from ted_scale.commands.pretrain import main

if __name__ == "__main__":
    run_main(main)
