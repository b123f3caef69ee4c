"""One self-contained page of a run, or of several: python tools/report.py RUN [RUN ...] --out report.html

ted_scale/report makes it, which a run calls, too; docs/report.md has what is drawn.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed, too

from ted_scale.base.exits import run_main
from ted_scale.report.__main__ import main

if __name__ == "__main__":
    run_main(main)
