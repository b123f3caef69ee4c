"""What this machine has and what is missing: python tools/doctor.py; ted_scale/commands/doctor.py has all of it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed, too

from ted_scale.base.exits import run_main
from ted_scale.commands.doctor import main

if __name__ == "__main__":
    run_main(main)
