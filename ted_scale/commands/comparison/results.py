"""Results of a comparison as files: one JSON a finished run, and from all of them a table, a CSV of curves and a picture.

Note: a paired difference is taken seed by seed, and its interval is wide for a few seeds (ted_scale/report/paired.py).
"""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.durable import write_durably
from ted_scale.commands.comparison import conditions
from ted_scale.commands.comparison import plan as plans
from ted_scale.commands.comparison.plan import Comparison
from ted_scale.report.paired import as_words, paired


class Point(NamedTuple):
    step: int
    tokens: int
    seconds: float | None
    loss: float


class Result(NamedTuple):
    """A run that is over: done, or ended by bad numbers. `seconds` are those it took itself, of steps and validation."""

    arm: str
    seed: int
    steps: int
    end: str  # "done", or why it is not
    seconds: float
    commit: str
    points: list[Point]

    def trained(self, before: int) -> list[Point]:
        """Without the validation before training, which an arm's own program need not have. `before` are its steps of stage I."""
        return [point for point in self.points if point.step > before]

    def loss(self, judged_by: str, before: int) -> float | None:
        """The last one or the least after the start. None for a run that ended early."""
        if self.end != "done" or not self.points:
            return None
        return self.points[-1].loss if judged_by == "last" else min(p.loss for p in self.trained(before) or self.points)


def note(plan: Comparison, result: Result) -> None:
    path = place_of(plan, result.arm, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(result._asdict(), indent=1) + "\n")


def noted(plan: Comparison) -> list[Result]:
    paths = [place_of(plan, arm, seed) for arm in plan.arms for seed in plan.seeds]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [Result(**{**values, "points": [Point(*point) for point in values["points"]]}) for values in found]


def place_of(plan: Comparison, arm: str, seed: int) -> Path:
    return plan.place / "results" / f"{arm}_seed{seed}.json"


def by_seed(plan: Comparison, results: list[Result], arm: str) -> dict[int, float]:
    before = plans.stage_i_steps(plans.of_arm(plan, arm))
    losses = {r.seed: r.loss(plan.judged_by, before) for r in results if r.arm == arm}
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def unequal_starts(plan: Comparison, results: list[Result]) -> dict[str, list[str]]:
    """Of each arm, by what the plan says and by what its runs measured before they trained."""
    runs = plans.runs_of(plan)
    said, firsts = conditions.starts_of(runs, plan.compared_with), {arm: {} for arm in plan.arms}
    before = {arm: plans.stage_i_steps(run) for arm, run in runs.items()}
    for result in results:  # the first row of an arm's own program may be of a later step
        first = result.points[0] if result.points else None
        if first and first.step == before[result.arm]:
            firsts[result.arm][result.seed] = first.loss
    for arm, losses in firsts.items():
        if began := conditions.began_elsewhere(losses, firsts[plan.compared_with]):
            said[arm].append(began)
    return said


def table(plan: Comparison, results: list[Result]) -> str:
    """Markdown, in the plan's order. `seconds` are those that the runs took themselves."""
    base, rows, starts = plan.compared_with, [], unequal_starts(plan, results)
    for arm in plan.arms:
        losses, mine = by_seed(plan, results, arm), [r for r in results if r.arm == arm]
        if not mine:
            rows.append([arm, "", "", "", "not run", "", "", ""])
            continue
        ends = sorted({r.end for r in mine if r.end != "done"})
        difference = None if arm == base else paired(losses, by_seed(plan, results, base))
        rows.append([
            arm, str(len(losses)), f"{mine[0].steps:,}", f"{statistics.mean(r.seconds for r in mine):,.0f}",
            f"{statistics.mean(losses.values()):.4f}" if losses else "-",
            f"{statistics.stdev(losses.values()):.4f}" if len(losses) > 1 else "-",
            as_words(difference), "; ".join([*([difference.verdict] if difference else []), *starts[arm], *ends]),
        ])  # fmt: skip
    loss = "val/loss" if plan.judged_by == "last" else "least val/loss"
    head = ["arm", "seeds", "steps", "seconds", loss, "spread", f"less {base}", ""]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def curves(results: list[Result]) -> str:
    """CSV, a row a validation."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "seed", *Point._fields, "commit"])
    for result in results:
        writer.writerows([result.arm, result.seed, *point, result.commit] for point in result.points)
    return out.getvalue()


def draw(plan: Comparison, results: list[Result], path: Path) -> bool:
    """Mean loss of each arm by tokens and, where they were measured, by seconds. False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    axes_of = ["tokens", *(["seconds"] if all(p.seconds is not None for r in results for p in r.points) else [])]
    figure = Figure(figsize=(6 * len(axes_of), 4.5), layout="constrained")
    for axes, across in zip(figure.subplots(1, len(axes_of), squeeze=False)[0], axes_of, strict=True):
        for arm in plan.arms:
            done = [r for r in results if r.arm == arm and r.end == "done" and r.points]
            if line := mean_curve(done, across, plans.stage_i_steps(plans.of_arm(plan, arm))):
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=arm)
        axes.set_xlabel(across)
        axes.set_ylabel("val/loss")
        axes.grid(alpha=0.3)
        axes.legend()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=150)
    part.rename(path)
    return True


def mean_curve(results: list[Result], across: str, before: int) -> list[tuple[float, float]]:
    """Over seeds, at the steps at which all of them validated: another version may have run some. The validation at the start would
    flatten all others, so it is left out."""
    each = [{point.step: point for point in result.trained(before)} for result in results]
    steps = sorted(set.intersection(*(set(points) for points in each))) if each else []
    columns = [[points[step] for points in each] for step in steps]
    return [(getattr(column[0], across), statistics.mean(p.loss for p in column)) for column in columns]
