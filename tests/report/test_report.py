"""The report of a run: what it reads from a folder, what it says is missing, and that no spike is lost."""

import json
import math
import re
import subprocess
import sys
from array import array

import numpy as np
import pytest
from bokeh.models import HoverTool
from report_runs import made, rows_of

from ted_scale.base.errors import UserError
from ted_scale.commands.report import main
from ted_scale.report import summary
from ted_scale.report.charts import EXACT, heat_figure, line_figure
from ted_scale.report.colours import INKS, LINES
from ted_scale.report.curves import charts
from ted_scale.report.events import events_in
from ted_scale.report.folder import read_run
from ted_scale.report.page import render, write
from ted_scale.report.paired import paired
from ted_scale.report.thinning import binned, thin
from ted_scale.vitals.alarms import alarms


def page(*folders) -> str:
    return render([read_run(folder) for folder in folders])


def test_a_spike_of_one_step_in_100_000_stays_at_its_height():
    values = np.sin(np.arange(100_000) / 50)
    values[31_415], values[77_777] = 99.0, -99.0
    steps, kept = thin(np.arange(100_000), values, 300)
    assert len(kept) <= 1500
    assert dict(zip(steps, kept, strict=True))[31_415] == 99 and kept.min() == -99
    assert kept[0] == values[0] and kept[-1] == values[-1]
    assert np.nanmax(binned(np.arange(100_000), values, 0, 99_999, 200)) == 99


def test_a_number_that_is_not_finite_stays_a_gap(tmp_path):
    rows = [*rows_of("ce", 8, 0, 1, 0.0)]
    rows[0]["loss/ce"] = None
    run = read_run(made(tmp_path, method="ce", steps=8, rows=rows))
    assert math.isnan(run.series["loss/ce"].values[0])
    _, kept = thin(np.arange(5000), np.where(np.arange(5000) == 4000, np.nan, 1.0), 50)
    assert np.isnan(kept).sum() == 1
    assert "NaN" not in page(run.folder).partition("<script>")[0]  # a page's JSON must be JSON


def test_seconds_are_the_time_of_the_steps_that_count(tmp_path):
    run = read_run(made(tmp_path, steps=40))
    assert run.times.seconds[-1] == pytest.approx(4.0)
    assert run.series["perf/other_ms"].values[0] == pytest.approx(69.0)


def test_the_time_line_has_what_the_log_says(tmp_path):
    run = read_run(made(tmp_path, steps=40))
    found = [(event.step, event.kind) for event in run.events if event.kind != "checkpoint"]
    assert found == [(0, "start"), (20, "restart"), (20, "restart"), (20, "change"), (20, "rewind"), (40, "end")]
    assert [event.step for event in run.events if event.kind == "checkpoint"] == [10, 20, 30, 40]
    whole = page(run.folder)
    assert "train.lr is 0.002 instead of 0.001 from step 20 on" in whole
    assert "it was killed, or its machine is gone" in whole


def test_every_number_of_a_run_is_drawn_or_in_a_table(tmp_path):
    """Also one that nobody has thought of yet."""
    rows = [
        {**row, "health/rank/0": 1.0, "health/rank/1": 2.0, "new/number": 3.0} for row in rows_of("ted", 8, 2, 1, 0.0)
    ]
    run = read_run(made(tmp_path, steps=8, rows=rows))
    found = charts([run])
    assert [chart.title for chart in found["more"]] == ["new"]
    assert {"health/rank by layer", "loss/layer by layer"} <= {chart.title for chart in found["layers"]}
    assert {line.label for line in found["loss"][0].lines} == {"total", "ce", "kl"}


def test_vitals_have_curves_and_their_alarms_are_events(tmp_path):
    """Numbers of the output in their own section, those of pairs by layer; the alarm as its line of the log stands there."""
    numbers = {"vitals/agreement": 0.5, "vitals/teacher_ce": 3.0, "vitals/kl_to_ce": 0.5, "vitals/cka/0": 0.9}
    run = read_run(made(tmp_path, steps=8, rows=[{**row, **numbers} for row in rows_of("ted", 8, 2, 1, 0.0)]))
    found = charts([run])
    assert len(found["vitals"]) == 3 and "more" not in found
    assert "vitals/cka by layer and time" in {chart.title for chart in found["layers"]}
    history = {"vitals/error/0": [0.5] * 4 + [0.9] * 4}
    [(_, sentence)] = alarms(history, 10.0).items()
    assert events_in(["step    300  total 4.1", f"10:00:00 step 321: {sentence}"])[0].kind == "alert"


def test_a_long_run_of_many_layers_with_vitals_stays_small(tmp_path):
    """100,000 steps, 32 pairs, each with the nine numbers that a pair has."""
    kinds = ("error", "cosine", "cka", "rank_states", "rank_filter_s", "rank_filter_t", "pull", "pull_cosine")
    vitals = {f"vitals/{kind}/{k}": 0.0 for kind in kinds for k in range(32)}
    draw = np.random.default_rng(0).random
    rows = [
        row | (dict(zip(vitals, draw(len(vitals)), strict=True)) if row["step"] % 100 == 0 else {})
        for row in rows_of("ted", 100_000, 32, 50, 0.0)
    ]
    assert len(page(made(tmp_path, steps=100_000, layers=32, rows=rows))) < 3_000_000


def test_a_pointer_reads_a_learning_rate(tmp_path):
    """Not 0.0000; and one step that spikes leaves colours to all others."""
    found = charts([read_run(made(tmp_path, steps=400))])
    drawn = line_figure(found["optimizer"][0])
    [hover] = [tool for tool in drawn.tools if isinstance(tool, HoverTool)]
    assert hover.formatters == {"$snap_y": "printf"} and EXACT in hover.tooltips[-1][1] and EXACT % 3e-5 == "3e-05"
    heat = heat_figure(found["layers"][0])
    assert heat.right[0].color_mapper.high < 6


def torn(path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: torn(folder / "metrics.jsonl"), "1 line that is torn"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl cannot be read"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "has no row yet"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "a": "b"}\n[]\n'), "2 lines that are torn"),
        (lambda folder: (folder / "run.toml").unlink(), "run.toml cannot be read"),
        (lambda folder: (folder / "run.toml").write_text("name = \n"), "run.toml is damaged"),
        (lambda folder: (folder / "log.txt").unlink(), "log.txt cannot be read"),
        (lambda folder: (folder / "life.json").write_text("{"), "life.json is not there"),
        (lambda folder: (folder / "evaluation.json").write_text('{"models": 3}'), "evaluation.json is no file of scores"),
        (lambda folder: (folder / "samples.jsonl").write_text('{"prompt": 3}\nx\n'), "There are none: no run has a file"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path, damage, said):
    folder = made(tmp_path)
    damage(folder)
    whole = page(folder)
    assert said in whole and "Where it stands" in whole
    if "metrics" not in said and "row" not in said and "2 lines" not in said:
        assert "Loss by term" in whole


def test_an_empty_folder_has_a_report(tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "metrics.jsonl cannot be read" in page(tmp_path / "nothing")


def test_several_runs_are_overlaid_and_compared_at_equal_steps(tmp_path):
    folders = [made(tmp_path, name="a"), made(tmp_path, name="b", method="ce", shift=0.25)]
    whole = page(*folders)
    assert "a term that a method does not have has no line" in whole
    assert "+0.2500" in whole
    drawn = charts([read_run(folder) for folder in folders])
    assert [len(chart.lines) for chart in drawn["loss"] if chart.title.endswith(": total")] == [2]
    assert [len(chart.lines) for chart in drawn["loss"] if chart.title.endswith(": kl")] == [1]


def test_arms_with_the_same_seeds_have_a_paired_interval(tmp_path):
    ours = [made(tmp_path, name=f"new{seed}", seed=seed, lr=2e-3, shift=0.1 * seed - 0.5) for seed in (0, 1)]
    theirs = [made(tmp_path, name=f"old{seed}", seed=seed, shift=0.1 * seed) for seed in (0, 1)]
    text = summary.by_seeds([read_run(folder) for folder in [*theirs, *ours]])
    assert "-0.5000 ± 0.0000" in text and "better" in text
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_arms_are_compared_at_the_last_step_that_all_of_them_validated(tmp_path):
    """Curves that are alike have no difference, however far each run is."""
    seeds, half = (0, 1), [row for row in rows_of("ted", 40, 3, 1, 0.0) if row["step"] <= 25]
    theirs = [made(tmp_path, name=f"old{seed}", seed=seed) for seed in seeds]
    ours = [made(tmp_path, name=f"new{seed}", seed=seed, lr=2e-3, rows=half) for seed in seeds]
    runs = [read_run(folder) for folder in [*theirs, *ours]]
    text = summary.by_seeds(runs)
    assert "new0, new1</th><td>2</td><td>20</td><td>+0.0000 ± 0.0000</td><td>noise" in text
    assert "less that of old0, old1" in text
    runs[-1].series["val/loss"].steps[:] = array("d", [11, 12])
    assert "no verdict" in summary.by_seeds(runs)


def test_a_run_whose_seed_is_no_number_is_in_no_arm(tmp_path):
    runs = [read_run(made(tmp_path, name=name, seed=seed)) for name, seed in (("a", 0), ("b", "[1]"))]
    assert [list(arm) for arm in summary.arms_of(runs)] == [[0]]


def test_samples_and_scores_stand_side_by_side(tmp_path):
    folder = made(tmp_path)
    sample = {"step": 40, "prompt": "Once", "student": "a <b>time</b>", "teacher": "upon a time"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    score = {"what": "piqa", "metric": "acc", "value": 0.61, "error": 0.01}
    (folder / "evaluation.json").write_text(json.dumps({"models": [{"model": "student_hf", "scores": [score]}]}))
    whole = page(folder)
    assert "a &lt;b&gt;time&lt;/b&gt;" in whole and "upon a time" in whole
    assert "student_hf" in whole and "0.61 ± 0.01" in whole


def test_samples_begin_with_the_newest_and_end_with_the_first(tmp_path):
    folder = made(tmp_path)
    rows = [{"step": step, "prompt": p, "student": f"text {step}{p}"} for step in range(0, 40, 4) for p in "ab"]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = re.findall(r"text (\w+)<", summary.samples([read_run(folder)]))
    assert found == ["36a", "36b", "32a", "32b", "28a", "28b", "24a", "24b", "20a", "20b", "0a", "0b"]


def test_a_stranger_s_text_is_no_markup_and_a_key_of_the_environment_is_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    folder = made(tmp_path)
    row = {"step": 1, "tokens": 9, "loss/</script><img src=x>": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "log.txt").write_text(f"10:00:00 W&B is offline {'f' * 40} <script>alert(1)</script>\n")
    whole = page(folder)
    assert "<img src=x>" not in whole and "<script>alert" not in whole and "f" * 40 not in whole


def test_mistakes_are_sentences(tmp_path):
    for words, said in (
        ([str(tmp_path / "no")], "RUN must be a run's folder"),
        ([str(made(tmp_path)), "--out", str(tmp_path)], "--out must be a file"),
    ):
        with pytest.raises(UserError, match=said):
            main(words)


def test_the_program_loads_neither_torch_nor_transformers(tmp_path):
    """It runs beside ranks that need the memory."""
    words = [str(made(tmp_path)), "--out", str(tmp_path / "r.html")]
    code = f"import sys; from ted_scale.commands.report import main; main({words!r})"
    code += "; print([name for name in ('torch', 'transformers', 'deepspeed', 'wandb') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_a_page_asks_for_nothing_from_elsewhere(tmp_path):
    """Its own parts; Bokeh's text names addresses that it never asks."""
    folder = made(tmp_path)
    whole = write([folder], tmp_path / "r.html").read_text()
    assert "default-src 'none'" in whole
    assert not re.search(r'(src|href)="(?!#|data:)', re.sub(r"<script>.*?</script>", "", whole, flags=re.S))


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    lights = []
    for colour in (one, other):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_stand_out_from_both_grounds(theme):
    inks = INKS[theme]
    for ground in (inks["ground"], inks["raised"]):
        for colour in (inks["text"], inks["soft"], inks["link"], *LINES[theme]):
            assert contrast(colour, ground) >= 4.5, (colour, ground)


def test_the_first_samples_stay_however_many_prompts_there_are():
    found = [{"step": step, "prompt": str(n)} for step in range(0, 90, 10) for n in range(20)]
    shown = [sample["step"] for sample in summary.newest_first(found)]
    assert len(shown) == summary.MOST_SAMPLES and shown == sorted(shown, reverse=True)
    assert set(shown) == {80, 70, 0}
