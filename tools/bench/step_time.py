"""Step time of `ted` beside `kd`: one process, one teacher, both students in turn, medians of the same steps.

Run it on a run whose stage I is done: its filters are used. On CPU one rank is the whole machine, so that threads and
caches are the same for both.
"""

import argparse
import statistics
import time

from ted_scale.errors import UserError, run_main
from ted_scale.run_file import load_run

METHODS = ("kd", "ted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="the run file of a ted run")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=11)
    arguments = parser.parse_args()
    run = load_run(arguments.config, arguments.set)
    if run.method != "ted":
        raise UserError(f"method must be ted to be compared with kd, but is {run.method}")
    times = measure(run, arguments.steps)
    kd, ted = (statistics.median(times[m]) for m in METHODS)
    ratio = statistics.median(t / k for k, t in zip(times["kd"], times["ted"], strict=True))
    print(
        f"kd {kd * 1e3:.0f} ms | ted {ted * 1e3:.0f} ms | ted / kd {ratio:.3f} (medians of {len(times['kd'])} steps in turn)"
    )


def measure(run, steps: int) -> dict[str, list[float]]:
    from ted_scale import build
    from ted_scale.plan import make_plan

    device = build.start_ranks()
    plans = {m: make_plan(variant(run, m), 1) for m in METHODS}
    teacher = build.build_teacher(plans["ted"])
    sides = {
        m: (plan.stages[-1], build.build_student(plan, plan.stages[-1], teacher, plan.filters_file))
        for m, plan in plans.items()
    }
    times = {m: [] for m in METHODS}
    batches = data(plans["ted"], device)
    for number, micro_batches in zip(range(steps + 1), batches, strict=False):
        for method, (stage, engine) in sides.items():
            start = time.perf_counter()
            one_step(stage, engine, teacher, micro_batches)
            if number:  # the first step of each allocates
                times[method].append(time.perf_counter() - start)
    return times


def variant(run, method: str):
    """The run with another method, and stage I taken from its own folder."""
    filters = run.filters.model_copy(update={"from_run": str(run.folder)})
    return run.model_copy(update={"method": method, "name": f"{run.name}-step-time", "filters": filters})


def data(plan, device):
    from ted_scale.data import open_stream
    from ted_scale.loader import Loader

    stream = open_stream(plan.run.data, plan.run.seed, plan.student.vocab_size)
    loader = Loader(
        workers=0,
        prefetch=plan.run.data.prefetch,
        micro_batch=plan.run.train.micro_batch,
        rank=0,
        world=1,
        device=device,
    )
    return loader.steps(stream, start=0, samples_per_step=plan.stages[-1].samples_per_step)


def one_step(stage, engine, teacher, micro_batches) -> None:
    from ted_scale.losses import count_valid, for_engine

    weights, denom = stage.weights(stage.first_step), count_valid(micro_batches)
    for batch in micro_batches:
        losses = engine(batch, teacher(batch, weights), weights, denom)
        engine.backward(for_engine(losses.total), scale_wrt_gas=False)
        engine.step()


if __name__ == "__main__":
    run_main(main)
