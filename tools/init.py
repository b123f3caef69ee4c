"""A commented run file for a teacher and a text: python tools/init.py; ted_scale/commands/init.py has all of it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed, too

from ted_scale.base.exits import run_main
from ted_scale.commands.init import main

if __name__ == "__main__":
    run_main(main)
