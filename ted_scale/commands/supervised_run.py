"""What a supervisor knows of the run that its command trains: the run file, and how far the run is.

Note: it reads the command's own words for that, because the command has not started yet.
"""

import argparse
import contextlib

from ted_scale.base.errors import Gone, UserError
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import life
from ted_scale.checkpoints.progress import Progress, read_progress


def run_file_of(command: list[str]) -> tuple[str, list[str]]:
    """--config and the --set of the command, as launch/pretrain.py will read them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[])
    known, _ = parser.parse_known_args(command)
    if known.config is None:
        raise UserError(
            "the command must name its run file by --config, but does not; the run file says where the checkpoints are"
        )
    return known.config, known.set


def step_of(run) -> int:
    """Of the newest checkpoint; the trainer reports one that is damaged or cannot be read."""
    with contextlib.suppress(UserError, Gone):
        newest = files.newest_checkpoint(run.folder)
        return read_progress(newest).step if newest else 0
    return 0


def not_saved(run, step: int) -> str:
    last = life.read(run.folder)
    return f" and {last.step - step} steps that are not saved" if last and last.step > step else ""


def is_done(run) -> bool:
    """`deepspeed` also exits with 0 if its launcher was killed."""
    from ted_scale.data import epochs  # imports torch: seconds and memory that are not needed earlier
    from ted_scale.distill.stages import stages_of

    with contextlib.suppress(UserError, Gone):
        newest = files.newest_checkpoint(run.folder)
        progress = read_progress(newest) if newest else Progress()
        known = epochs.resolved(
            run, progress.run
        )  # as the next start has them: other epochs than before are counted anew
        return progress.step >= stages_of(known)[-1].last_step
    return False
