"""Train the run of a run file: `ted-scale pretrain --config RUN.toml`, or `deepspeed launch/pretrain.py --config RUN.toml`.

From a wheel it is `deepspeed --num_gpus N --module ted_scale.commands.pretrain --config RUN.toml`. The launcher starts one
process a rank and passes --local_rank; the environment has the same number.
"""

import argparse
import logging
import os

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.config.run_file import load_run
from ted_scale.metrics import console
from ted_scale.ranks import signals


def main(argv: list[str] | None = None) -> None:
    signals.listen()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="the run file, TOML; its paths count from the current folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="overrides the run file"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved run and its arithmetic, and start nothing; packs of examples that are not there are made",
    )
    parser.add_argument("--ranks", type=int, help="ranks to assume in a dry run; default: the launcher's, or 1")
    parser.add_argument(
        "--quiet", action="store_true", help="the console shows warnings and the end alone; log.txt has all"
    )
    parser.add_argument("--log-level", choices=["info", "warning", "error"], default="info", help="of the console")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    console.choose_level("warning" if arguments.quiet else arguments.log_level)
    check_ranks(arguments.ranks, arguments.dry_run)
    run = load_run(arguments.config, arguments.set)
    if arguments.dry_run:
        logging.disable(logging.WARNING)  # DeepSpeed logs to stdout, where the run file is printed
    else:
        console.say_early(f"run {run.name}: looking at its models and corpora")

    from ted_scale.plan import make_plan  # imports take seconds; a typing mistake should not wait for them

    plan = make_plan(run, world=arguments.ranks or int(os.environ.get("WORLD_SIZE", "1")))
    if arguments.dry_run:
        show(run, plan)
        return

    start = "rank starts" if plan.world == 1 else "ranks start"
    console.say_early(
        f"{plan.world} {start}; the first start on a machine may compile parts of DeepSpeed, and every start waits where DNS "
        "does not answer"
    )
    from ted_scale.run import run_plan

    run_plan(plan)


def show(run, plan) -> None:
    """What a dry run prints: the run as its file resolves, not as the plan completes it, and its arithmetic."""
    from ted_scale.config.run_file import to_toml
    from ted_scale.distill import memory
    from ted_scale.engines import check_engine_config
    from ted_scale.forecast import summary
    from ted_scale.plan import describe

    check_engine_config(plan)
    forecast = [*memory.describe(plan), *summary.describe(plan)]
    print(to_toml(run), describe(plan), *forecast, sep="\n")


def check_ranks(ranks: int | None, dry_run: bool) -> None:
    """A real run has the ranks that its launcher started; with accumulation for others it would train other steps."""
    if ranks is not None and not dry_run:
        raise UserError(
            f"--ranks must come with --dry-run, but is {ranks} without it; the launcher decides how many start"
        )
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks must be at least 1, but is {ranks}; leave it out to use the launcher's number")


if __name__ == "__main__":
    run_main(main)
