"""What a reader wants first: where each run stands, what is missing, and how the runs differ.

Note: runs are compared at equal steps of their validations, and, where several runs differ in nothing but the seed, by seeds: only
the second has an interval, because the losses of one run are no independent draws.
"""

import math
import time
from html import escape

from ted_scale.report.charts import Chart, Line, html
from ted_scale.report.events import KINDS, notable
from ted_scale.report.folder import RunSeen, at_step
from ted_scale.report.paired import as_words, paired
from ted_scale.report.tables import amount, bullets, duration, share, table

ALIVE_S = 60  # life.json is written every 10 s
COUNTED = ("restart", "rewind", "alert")
FREE = {"name", "seed", "runs"}  # keys that arms of a comparison need not share, or never do
SAMPLED, MOST_SAMPLES = 5, 60  # steps whose samples a page has, and texts of a run


def overview(runs: list[RunSeen]) -> str:
    rows = [
        ["method", *(run.method for run in runs)],
        ["state", *map(state, runs)],
        ["step", *(f"{run.step:,} of {run.total_steps:,}" if run.total_steps else f"{run.step:,}" for run in runs)],
        ["tokens", *(amount(run.times.tokens[-1] if run.times.tokens else None) for run in runs)],
        ["time left at the last pace", *(duration(left(run)) for run in runs)],
        ["held-out loss: first", *(amount(first(run, "val/loss")) for run in runs)],
        ["held-out loss: last", *(amount(run.last("val/loss")) for run in runs)],
        ["held-out loss: the teacher", *(amount(run.last("val/teacher_loss")) for run in runs)],
        ["tokens/s", *(amount(run.last("perf/tokens_per_s")) for run in runs)],
        ["MFU", *(share(run.last("perf/mfu")) for run in runs)],
        ["a step, ms: measured / forecast", *(beside(run, "perf/step_ms", "perf/forecast_ms") for run in runs)],
        ["memory, GiB: peak / forecast", *(beside(run, "memory/peak_gib", "memory/forecast_gib") for run in runs)],
        ["goodput", *(share(run.last("perf/goodput")) for run in runs)],
        ["restarts / rewinds / alerts", *(" / ".join(str(count(run, kind)) for kind in COUNTED) for run in runs)],
    ]  # fmt: skip
    return table(["", *(run.name for run in runs)], rows, "Where each run stands", wrap=True)


def state(run: RunSeen) -> str:
    if run.total_steps and run.step >= run.total_steps:
        return "done"
    if run.life is None:
        return "unknown"
    ago = time.time() - run.life.spent.at
    if run.life.words:
        return f"ended: {run.life.words}"
    return "running" if ago < ALIVE_S else f"no sign of life for {duration(ago)}"


def left(run: RunSeen) -> float | None:
    each = run.last("perf/step_ms")
    return max(0, run.total_steps - run.step) * each / 1e3 if run.total_steps and each else None


def first(run: RunSeen, key: str) -> float | None:
    return run.series[key].values[0] if key in run.series else None


def beside(run: RunSeen, measured: str, forecast: str) -> str:
    return f"{amount(run.last(measured))} / {amount(run.last(forecast))}"


def count(run: RunSeen, kind: str) -> int:
    """A restart has two lines in the log: that it resumes, and what the end before it cost."""
    if kind == "restart":
        return sum(event.kind == kind and event.text.startswith("resuming") for event in run.events)
    return sum(event.kind == kind for event in run.events)


def missing(runs: list[RunSeen]) -> str:
    sentences = [f"{run.name}: {sentence}" for run in runs for sentence in run.missing]
    sentences += [f"{run.name}: it has no validation" for run in runs if run.series and "val/loss" not in run.series]
    if len({run.method for run in runs}) > 1:
        methods = ", ".join(f"{run.name} is {run.method}" for run in runs)
        sentences.append(
            f"the runs are of different methods ({methods}): a term that a method does not have has no line"
        )
    return bullets(sentences) if sentences else "<p>Nothing is missing.</p>"


def differences(runs: list[RunSeen]) -> str:
    """Every run less the first, where both validated at the same step; and arms by seeds."""
    base, rows, lines = runs[0], [], []
    theirs = losses(base)
    for number, run in enumerate(runs[1:], 1):
        ours = losses(run)
        both = sorted(ours.keys() & theirs.keys())
        if not both:
            rows.append([run.name, "0", "-", "-", "-"])
            continue
        apart = [ours[step] - theirs[step] for step in both]
        rows.append(
            [
                run.name,
                str(len(both)),
                f"{both[-1]:,.0f}",
                f"{apart[-1]:+.4f}",
                f"{min(apart):+.4f} to {max(apart):+.4f}",
            ]
        )
        lines.append(Line(f"{run.name} less {base.name}", number, both, apart))
    head = ["run", "validations at equal steps", "last step", f"less {base.name}, last", "over all"]
    about = "Below zero is better than the first run. Only validations at the same step count."
    drawn = html(Chart("paired", f"Held-out loss less that of {base.name}", about, lines, "nats")) if lines else ""
    return drawn + table(head, rows, f"Held-out loss less that of {base.name}") + by_seeds(runs)


def losses(run: RunSeen) -> dict[float, float]:
    found = run.series.get("val/loss")
    return dict(zip(found.steps, found.values, strict=True)) if found else {}


def by_seeds(runs: list[RunSeen]) -> str:
    """A row for each arm (runs that share all but name and seed), if two arms share seeds."""
    arms = arms_of(runs)
    theirs, *others = arms or [{}]
    rows = [against(ours, theirs) for ours in others if ours.keys() & theirs.keys()]
    if not rows or max(map(len, arms)) < 2:
        return "<p>There is no interval: it needs arms that were run with the same several seeds.</p>"
    title = f"Held-out loss by arms, less that of {names_of(theirs)}, paired by seed, with the 95 % interval"
    return f"<h3>{escape(title)}</h3>" + table(["arm", "seeds", "at step", "difference", ""], rows, title, wrap=True)


def arms_of(runs: list[RunSeen]) -> list[dict[int, RunSeen]]:
    """By seed, in the order of the runs. A stranger's run file may have a seed that is no number: its run is in no arm."""
    arms: dict[str, dict[int, RunSeen]] = {}
    for run in runs:
        if type(seed := run.settings.get("seed", 0)) is int:
            key = str(sorted((k, str(v)) for k, v in run.settings.items() if k not in FREE))
            arms.setdefault(key, {})[seed] = run
    return list(arms.values())


def against(ours: dict[int, RunSeen], theirs: dict[int, RunSeen]) -> list[str]:
    """One arm less the other at one step that all of their runs reached: a finished run is no match for half of one."""
    seeds = str(len(ours.keys() & theirs.keys()))
    by_run = [validated(run) for run in [*ours.values(), *theirs.values()]]
    if not (steps := set.intersection(*map(set, by_run))):
        return [names_of(ours), seeds, "-", "-", "no verdict: there is no step at which all of these runs validated"]
    step = max(steps)
    one, other = ({seed: validated(run)[step] for seed, run in arm.items()} for arm in (ours, theirs))
    found = paired(one, other)
    return [names_of(ours), seeds, f"{step:,.0f}", as_words(found), found.verdict if found else "-"]


def validated(run: RunSeen) -> dict[float, float]:
    return {step: loss for step, loss in losses(run).items() if math.isfinite(loss)}


def names_of(arm: dict[int, RunSeen]) -> str:
    return ", ".join(run.name for run in arm.values())


def time_line(runs: list[RunSeen]) -> str:
    lines = [
        Line(run.name, number, [e.step for e in run.events], [KINDS.index(e.kind) for e in run.events])
        for number, run in enumerate(runs)
        if run.events
    ]
    about = "At their steps. Restarts and rewinds are dotted lines in every curve, too."
    drawn = html(Chart("time-line", "Time line", about, lines, dots=True, names=KINDS)) if lines else ""
    rows = [
        [
            run.name,
            f"{e.step:,}",
            duration(at_step(run.times, run.times.seconds, e.step)),
            e.clock or "-",
            e.kind,
            e.text,
        ]
        for run in runs
        for e in notable(run.events)
    ]
    head = ["run", "step", "training time", "clock", "event", "what the log says"]
    return (
        drawn
        + f"<details><summary>All events ({len(rows):,})</summary>{table(head, rows, 'Events', wrap=True)}</details>"
    )


def changes(runs: list[RunSeen]) -> str:
    rows = [[run.name, f"{e.step:,}", e.text] for run in runs for e in run.events if e.kind == "change"]
    return table(["run", "step", "what changed"], rows, "What changed at each resume", wrap=True)


def settings(runs: list[RunSeen]) -> str:
    """What differs between several runs, then each run file whole."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    unlike = [key for key in keys if len({str(run.settings.get(key, "-")) for run in runs}) > 1]
    rows = [[key, *(str(run.settings.get(key, "-")) for run in runs)] for key in unlike]
    apart = (
        f"<h3>What differs</h3>{table(['key', *(run.name for run in runs)], rows, 'What differs', wrap=True)}"
        if rows
        else ""
    )
    whole = "".join(
        f'<details><summary>run.toml of {escape(run.name)}</summary><pre tabindex="0">{escape(run.toml)}</pre></details>'
        for run in runs
        if run.toml
    )
    return apart + (whole or '<p class="none">No run file could be read.</p>')


def samples(runs: list[RunSeen]) -> str:
    found = [(run, sample) for run in runs for sample in newest_first(run.samples)]
    if not found:
        return '<p class="none">There are none: no run has a file samples.jsonl.</p>'
    rows = [
        [run.name, f"{s['step']:,}" if "step" in s else "-", s["prompt"], s["student"], s.get("teacher", "-")]
        for run, s in found
    ]
    return table(["run", "step", "prompt", "student", "teacher"], rows, "Samples of student and teacher", wrap=True)


def newest_first(found: list[dict]) -> list[dict]:
    """Those of the last steps, and at the end the first ones, from which they came."""
    steps = sorted({sample.get("step", 0) for sample in found}, reverse=True)
    newest, first = (
        [sample for step in which for sample in found if sample.get("step", 0) == step]
        for which in (steps[:SAMPLED], steps[SAMPLED:][-1:])
    )
    first = first[:MOST_SAMPLES]
    return [*newest[: MOST_SAMPLES - len(first)], *first]


def scores(runs: list[RunSeen]) -> str:
    """The last score of each task that training asked, and what ted-scale evaluate wrote into the run's folder."""
    keys = list(dict.fromkeys(key for run in runs for key in run.series if key.startswith("val/suite/")))
    rows = [[key.removeprefix("val/suite/"), *(amount(run.last(key)) for run in runs)] for key in keys]
    asked = table(["task", *(run.name for run in runs)], rows, "Last scores of the suite") if rows else ""
    files = [
        [run.name, f["file"], model, what, metric, amount(value) + (f" ± {amount(error)}" if error else "")]
        for run in runs
        for f in run.scores
        for model, what, metric, value, error in f["rows"]
    ]
    told = (
        table(["run", "file", "model", "task", "metric", "score"], files, "Scores of ted-scale evaluate")
        if files
        else ""
    )
    none = "There are none: validation.suite was not asked, and the folder has no evaluation*.json."
    return asked + told or f'<p class="none">{none}</p>'
