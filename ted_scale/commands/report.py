"""One self-contained page of a run, or of several: ted-scale report RUN [RUN ...] --out report.html

What a run's folder lacks is said in the page, and the rest is shown. docs/report.md has what is drawn.
"""

import argparse
import os
from pathlib import Path

from ted_scale.base.errors import UserError, shown
from ted_scale.base.exits import run_main
from ted_scale.base.packages import install_extra

MOST = 8  # runs, which is how many colours there are


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, such as runs/NAME")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"))
    parser.add_argument("--background", action="store_true", help="with the lowest priority, beside a run")
    arguments = parser.parse_args(argv)
    if arguments.background:
        os.nice(19)
    for folder in arguments.runs:
        if not folder.is_dir():
            raise UserError(f"RUN must be a run's folder, but {shown(str(folder))} is none; give one such as runs/NAME")
    if len(arguments.runs) > MOST:
        raise UserError(f"RUN must be at most {MOST} folders, but is {len(arguments.runs)}; leave some of them out")
    if arguments.out.is_dir():
        raise UserError(f"--out must be a file, but {shown(str(arguments.out))} is a folder; name a file in it")
    try:
        from ted_scale.report.page import write
    except ModuleNotFoundError as error:
        raise UserError(
            f"the report must be drawn by Bokeh, but {error.name} is not installed; {install_extra('report')}"
        ) from None
    path = write(arguments.runs, arguments.out)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
