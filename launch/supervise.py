"""`ted-scale supervise` from a checkout, installed or not; ted_scale/commands/supervise.py is the command."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ted_scale.base.exits import run_main
from ted_scale.commands.supervise import main

if __name__ == "__main__":
    run_main(main)
