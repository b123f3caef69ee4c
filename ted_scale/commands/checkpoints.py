"""A run's checkpoints: ted-scale checkpoints RUN list | verify | prune

`list` checks names and sizes. `verify` reads every byte and exits with 1 if one is not as it was written or cannot be read.
`prune` removes checkpoints that the run file's [checkpoint] does not keep, damaged ones, and what a crash left unfinished.
Without --yes, prune only lists them. While a checkpoint cannot be read, it removes nothing: nobody knows which are kept.
"""

import argparse
import datetime
import sys
from pathlib import Path

from ted_scale.base import beneath, durable
from ted_scale.base.errors import Gone, UserError, files_at
from ted_scale.base.exits import run_main
from ted_scale.base.redact import printable
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import holder, strangers
from ted_scale.checkpoints.folder import Published
from ted_scale.config.operation import Checkpoint
from ted_scale.config.run_file import load_run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument("--keep", type=int, help="how many of the newest are kept; default: the run file's")
    parser.add_argument(
        "--keep-every",
        type=int,
        metavar="STEPS",
        help="checkpoints of these steps are kept for ever; default: the run file's",
    )
    parser.add_argument("--keep-best", action="store_true", default=None, help="keep the lowest validation loss")
    parser.add_argument("--yes", action="store_true", help="prune: remove them")
    arguments = parser.parse_args(argv)
    with files_at(arguments.run):
        is_run = files.checkpoints_of(arguments.run).is_dir()
    if not is_run:
        raise UserError(f"RUN must be a run's folder, with checkpoints in it, but {arguments.run} is not")
    return arguments


def judge(path: Path, reads_all: bool) -> tuple[Published, str]:
    """(the checkpoint, what it is: whole, damaged, or not to be read now)"""
    try:
        found = files.look_at(path)
        fault = found.fault or (files.check_digests(path) if reads_all else None)
    except Gone as error:
        return Published(path, None, None), f"cannot be read: {error}"
    return found, f"DAMAGED: {fault}" if fault else "whole"


def say(line: str) -> None:
    print(printable(line), flush=True)


def describe(checkpoint: Published, what_it_is: str, best: str | None, by: str) -> str:
    manifest = checkpoint.manifest or {"files": {}}
    size = sum(entry.bytes for entry in manifest["files"].values())
    loss, ranks = manifest.get("validation"), manifest.get("ranks", "?")
    when = datetime.datetime.fromtimestamp(checkpoint.path.lstat().st_mtime).strftime("%Y-%m-%d %H:%M")
    held = f"{size / 1e6:>12,.1f} MB  {ranks:>5} ranks  {f'val {loss:.4f}' if loss is not None else '':<12}"
    number = files.number_of(manifest, by) if by != "val/loss" else None  # that is shown above
    scored = "" if number is None else f"{by} {number:.4f}  "
    return f"{checkpoint.path.name}  {when}  {held}  {scored}{'best, ' * (checkpoint.path.name == best)}{what_it_is}"


def settings_of(arguments) -> Checkpoint:
    """The run file's settings; the command line overrides them."""
    path = arguments.run / "run.toml"
    written = load_run(path).checkpoint if path.is_file() else Checkpoint()
    given = {"keep": arguments.keep, "keep_every": arguments.keep_every, "keep_best": arguments.keep_best}
    settings = written.model_copy(update={key: value for key, value in given.items() if value is not None})
    if settings.keep < 1 or settings.keep_every < 0:
        raise UserError(
            f"--keep must be at least 1 and --keep-every at least 0, but are {settings.keep} and {settings.keep_every}"
        )
    return settings


def to_remove(folder: Path, settings: Checkpoint) -> list[Path]:
    """Reads every byte first: a checkpoint that is damaged inside must not be kept instead of a complete one. Gone if one cannot
    be read."""
    checkpoints = [s._replace(fault=s.fault or files.check_digests(s.path)) for s in files.published(folder)]
    whole = {s.path.name: s.manifest for s in checkpoints if s.fault is None}
    if checkpoints and not whole:
        raise files.none_is_whole(folder, [(s.path, s.fault) for s in checkpoints])
    stays = files.kept(whole, settings)
    parts = sorted(
        p for p in files.checkpoints_of(folder).glob(f"*{durable.PART}") if not p.name.endswith(durable.ASIDE)
    )
    return [c.path for c in checkpoints if c.path.name not in stays] + parts


def best_here(arguments) -> tuple[str, str | None]:
    """(the number that checkpoints are compared by, the best one's name). None while a checkpoint or the run file cannot be read:
    nobody knows."""
    try:
        settings, found = settings_of(arguments), files.published(arguments.run)
    except (Gone, UserError):
        return "", None
    return settings.judged_by, files.best_of({c.path.name: c.manifest for c in found if c.fault is None}, settings)


def prune(arguments) -> None:
    if arguments.yes:
        hold(arguments.run)
        durable.put_back(files.checkpoints_of(arguments.run))
    doomed = to_remove(arguments.run, settings_of(arguments))
    for path in doomed:
        say(f"{'removing' if arguments.yes else 'would remove'} {path}")
        if arguments.yes:
            beneath.discard(path) if path.name.endswith(durable.PART) else durable.remove(path)
    if doomed and not arguments.yes:
        print("nothing was removed; add --yes to remove them")
    holder.leave(arguments.run)


def hold(folder: Path) -> None:
    """As a run does, so that none begins meanwhile."""
    from ted_scale.run_folder import lock

    strangers.refuse(folder)
    beneath.keep_inside(folder)
    if not lock(folder):
        raise UserError(f"RUN must not be training when it is pruned, but a process trains in {folder}; wait for it")
    with files_at(folder):
        holder.take(folder)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    with files_at(arguments.run):
        prune(arguments) if arguments.action == "prune" else show(arguments)


def show(arguments) -> None:
    others, (by, best) = 0, best_here(arguments)
    for path in files.listed(arguments.run):
        checkpoint, what_it_is = judge(path, arguments.action == "verify")
        try:
            say(describe(checkpoint, what_it_is, best, by))
            others += what_it_is != "whole"
        except FileNotFoundError:  # a run that trains keeps the newest ones only
            say(f"{path.name}  removed meanwhile")
    for part in sorted(files.checkpoints_of(arguments.run).glob(f"*{durable.PART}")):
        say(f"{part.name}  unfinished")
    for line in files.renamed(arguments.run):
        say(line)
    if others and arguments.action == "verify":
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
