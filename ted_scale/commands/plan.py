"""What a run needs, how fast it is and which way is best, without a GPU: ted-scale plan RUN.toml --gpus 64 --gpu h100

Only the run file and both configs are read: no weights, and of the data the corpora's sizes, for train.epochs. Without --gpu the
machine is the one that --calibrate measured (RUNS/machine.json). Exits with 1 if the run as written does not fit.
"""

import argparse
import os
import sys
from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.config.run import Run
from ted_scale.config.run_file import load_run


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    run = load_run(arguments.run, arguments.set, argument="RUN.toml")
    if arguments.calibrate:
        from ted_scale.commands.planning import calibrate

        calibrate.measure_and_keep(run, arguments.machine or kept(run), arguments.minutes)
        return
    from ted_scale.commands.planning import options, scale
    from ted_scale.commands.planning.page import page

    machine = machine_of(arguments, run)
    if arguments.scale:
        print(scale.table(run, machine, arguments))
        return
    cluster = options.Cluster(machine, arguments.gpus, arguments.per_node)
    options.check(cluster)
    plan = options.base(run)
    written = options.as_written(plan, run, cluster)
    other = options.as_written(plan, run, cluster, checkpointing=not run.student.gradient_checkpointing)
    ways, best = options.placements(written.plan, cluster), options.best(plan, run, cluster)
    rounded = options.in_8_bits(written.plan, cluster)
    print("\n".join(page(written, ways, other, rounded, best, cluster, arguments.price)))
    sys.exit(0 if written.fits else 1)


def kept(run: Run) -> Path:
    from ted_scale.forecast.machine import FILE

    return Path(run.runs) / FILE


def machine_of(arguments, run: Run):
    from ted_scale.commands.planning.scale import GPUS
    from ted_scale.forecast import machine as machines

    if arguments.gpu:
        found = machines.named(arguments.gpu, run.train.precision)
    else:
        file = arguments.machine or kept(run)
        if not file.exists():
            raise UserError(
                f"--gpu must be set where no machine was calibrated, but is not, and {file} does not exist; choose one of "
                f"{', '.join(machines.SHEETS)}, or run --calibrate there"
            )
        found = machines.read(file)
        if why := machines.unfit(found, run.train.precision, max(GPUS) if arguments.scale else arguments.gpus):
            raise UserError(why)
    return found.between_nodes(arguments.bandwidth * 1e9 / arguments.per_node if arguments.bandwidth else None)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    say = parser.add_argument
    say("run", metavar="RUN.toml")
    say("--set", action="append", default=[], metavar="section.key=value", help="overrides the run file")
    say("--gpus", type=positive(int), default=int(os.environ.get("WORLD_SIZE", "1")), help="also the number of ranks")
    say("--gpu", metavar="NAME", help="h100, a100, h200, b200, mi300x; default: the machine that was calibrated")
    say("--per-node", type=positive(int), default=8)
    say(
        "--bandwidth",
        type=positive(float),
        metavar="GB/s",
        help="what a node receives from the others; default: the device's usual one",
    )
    say("--price", type=positive(float), default=0.0, help="of a GPU for an hour")
    say("--scale", action="store_true", help="the best way on 8 to 4096 GPUs, with failures")
    say("--calibrate", action="store_true", help="measure this machine with this run's shapes, and keep it")
    say("--minutes", type=positive(float), default=1.0, help="of --calibrate")
    say(
        "--machine",
        type=Path,
        metavar="FILE",
        help="the calibration to write or read; default: machine.json in the run file's runs",
    )
    say("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def positive(kind):
    def parsed(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, but is {text}")
        return value

    return parsed


if __name__ == "__main__":
    run_main(main)
