"""ted-scale compare: equal conditions, budgets, paired differences, and a comparison that goes on.

Runs are stand-ins that write what a run writes; the last test, of `make soak`, starts real ones.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy
import psutil
import pytest
import tomli_w
from tiny import make_corpus, make_model, make_run, write_run

from ted_scale.base.errors import NUMBERS, RunStopped, UserError
from ted_scale.checkpoints import life
from ted_scale.checkpoints.life import Life, Spent
from ted_scale.commands import compare
from ted_scale.commands.comparison import plan as plans
from ted_scale.commands.comparison import prices, results, starts
from ted_scale.commands.comparison.prices import Price
from ted_scale.config.run_file import load_run
from ted_scale.distill.stages import stages_of
from ted_scale.ranks import capacity
from ted_scale.report.paired import Difference

ARMS = {"ce": ["method=ce"], "kd": ["method=kd"], "ted": ["method=ted", "filters.steps=4"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    make_model(root / "teacher", "llama", hidden_size=48, num_hidden_layers=2)
    make_model(root / "student", "gpt2", num_hidden_layers=2, seed=1)
    make_corpus(root / "corpus")
    train = {"steps": 9, "tokens_per_step": 384, "precision": "fp32", "lr": 1e-3}
    write_run(root / "base.toml", make_run(root, train=train))
    return root


@pytest.fixture
def write(root, tmp_path):
    """Writes a plan and returns its path."""

    def to(**values) -> str:
        known = {
            "run": str(root / "base.toml"),
            "folder": str(tmp_path / "out"),
            "arms": ARMS,
            "budget": {"tokens": 7680},
        }
        (tmp_path / "plan.toml").write_text(tomli_w.dumps({**known, **values}))
        return str(tmp_path / "plan.toml")

    return to


# Equal conditions


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["student.path=elsewhere"],
            r"arms.other must have the student.path of arms.ce \('.*student'\), but has 'elsewhere'; if ",
        ),
        (
            ["data.seq_len=64"],
            r"arms.other must have the data.seq_len of arms.ce \(32\), but has 64; if that is what is ",
        ),
        (["data.blend.kind=temperature"], r"data.blend.kind of arms.ce"),
        (["train.tokens_per_step=768"], r"train.tokens_per_step of arms.ce"),
        (
            ["teacher.path=elsewhere"],
            r"have the teacher.path of arms.kd \('.*teacher'\), but has 'elsewhere'; if that is",
        ),
        (["seed=3"], r"arms.other must not set seed, because the comparison does"),
        (["train.steps=3"], r"must not set train.steps"),
        (["train.epochs=7"], r"must not set train.epochs, because the comparison does"),
        (["method=cee"], r"^arms.other: --set method: method must be"),
    ],
)
def test_arms_that_start_or_read_differently_are_refused(write, words, sentence):
    with pytest.raises(UserError, match=sentence):
        plans.load(write(arms={**ARMS, "other": words}))


def test_what_a_plan_names_in_differ_may_differ(write):
    arms = {**ARMS, "long": ["data.seq_len=64"]}
    assert "long" in plans.load(write(arms=arms, differ=["data.seq_len"])).arms
    assert "long" in plans.load(write(arms=arms, differ=["data"])).arms


def test_a_section_that_one_side_has_none_of_is_named_as_a_whole(write):
    """student.lora alone is what differ needs; its keys came one by one."""
    arms = {"whole": [], "lora": ["student.lora={rank=4}"]}
    with pytest.raises(
        UserError, match=r"^arms.lora must have the student.lora of arms.whole \(not set\), but has .*rank"
    ):
        plans.load(write(arms=arms))
    assert "lora" in plans.load(write(arms=arms, differ=["student.lora"])).arms


def test_an_arm_that_asks_no_teacher_may_name_another(write):
    assert "other" in plans.load(write(arms={**ARMS, "other": ["method=ce", "teacher.path=elsewhere"]})).arms


def test_the_table_names_the_arm_that_starts_from_a_trained_student_as_the_official_code_s_ted_does(write):
    """There kd and lwd start from a raw student, and ted from one that was fine-tuned on the task."""
    arms = {"kd": ["method=kd"], "ted": ["method=ted", "student.path=fine_tuned"]}
    with pytest.raises(UserError, match=r"arms.ted must have the student.path of arms.kd"):
        plans.load(write(arms=arms))
    plan = plans.load(write(arms=arms, differ=["student.path"]))
    kd, ted = results.table(plan, [begun_at("kd", 9.0), begun_at("ted", 4.0)]).splitlines()[2:]
    assert kd.endswith("| - |  |")
    assert ted.endswith("| one seed; student.path = 'fine_tuned'; began at 4.0000, not 9.0000 |")


def test_runs_of_one_path_that_began_with_other_losses_are_named_by_their_seed_s(write):
    plan = plans.load(write(seeds=[0, 1]))
    found = [begun_at("ce", 9.0), begun_at("ce", 8.0, seed=1), begun_at("kd", 9.0005), begun_at("ted", 8.1, seed=1)]
    ce, kd, ted = results.table(plan, found).splitlines()[2:]
    assert "began" not in ce + kd and "began at 8.1000, not 8.0000" in ted


def test_a_program_that_validates_only_later_is_not_said_to_have_begun_elsewhere(write):
    later = begun_at("kd", 7.0)._replace(points=[results.Point(1, 384, None, 7.0)])
    assert "began" not in results.table(plans.load(write()), [begun_at("ce", 9.0), later])


def test_tokens_that_made_an_arm_s_filters_before_it_began_are_in_the_table(write, tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "before/run.toml").write_text("filters.steps = 3\ntrain.tokens_per_step = 512\n")
    arms = {"ted": [], "borrowed": [f"filters.from={tmp_path / 'before'}"], "gone": ["filters.from=nowhere"]}
    plan = plans.load(write(arms=arms))
    ted, borrowed, gone = results.table(plan, [begun_at(arm, 9.0) for arm in arms]).splitlines()[2:]
    assert "filters" not in ted and f"filters of {tmp_path}/before, which read 1,536 tokens before" in borrowed
    assert "filters of nowhere |" in gone


def begun_at(arm: str, loss: float, seed: int = 0) -> results.Result:
    """A run whose held-out loss was this before stage II, which comes after the 4 steps of stage I in `ted`."""
    step = 4 if arm == "ted" else 0
    points = [results.Point(step, 0, None, loss), results.Point(step + 1, 384, None, 3.0)]
    return results.Result(arm, seed, 1, "done", 1.0, "c0ffee", points)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"budget": {}}, r"budget.tokens, seconds or steps must be set, and only one of them, but none is"),
        ({"budget": {"tokens": 1, "seconds": 1.0}}, r"but tokens and seconds are"),
        ({"budget": {"steps": 9}}, r"budget.of must name the arm whose steps are the budget, but is missing; add"),
        ({"budget": {"tokens": 9, "of": "ce"}}, r"budget.steps must be set beside of = 'ce', but is missing; say"),
        ({"budget": {"steps": 9, "of": "lwd"}}, r"budget.of must be one of the arms"),
        ({"programs": {"lwd": "mine.py"}}, r"programs must be one of the arms"),
        ({"spent": {"lwd": 1.0}, "budget": {"seconds": 9.0}}, r"spent must be one of the arms"),
        ({"spent": {"ce": 1.0}}, r"spent must be left out with a budget of tokens"),
        ({"baseline": "lwd"}, r"baseline must be one of the arms"),
        ({"seeds": [1, 1]}, r"seeds must differ, but are \[1, 1\]"),
        ({"sedes": [1]}, r"unknown key sedes; did you mean seeds\?"),
        ({"arms": {}}, r"arms must "),
        ({"arms": {"a_b": []}}, r"arms"),
    ],
)
def test_a_mistake_in_a_plan_is_one_sentence(write, values, sentence):
    with pytest.raises(UserError, match=sentence):
        plans.load(write(**values))


# Budgets


def test_a_budget_of_tokens_pays_for_stage_i(write):
    plan = plans.load(write(budget={"tokens": 7680}))
    assert [prices.steps_within(plan, arm, {}) for arm in ("ce", "ted")] == [20, 16]
    with pytest.raises(
        UserError, match=r"budget.tokens \(1,536\) must hold a step of arms.ted after its 4 steps of stage I"
    ):
        prices.steps_within(plans.load(write(budget={"tokens": 1536})), "ted", {})


FALLS = "loss.kl={{start=1, end=0, shape='linear', over_tokens={}}}"


def test_a_schedule_in_tokens_is_held_against_the_steps_that_the_budget_gives(write, started, root):
    """And not against those of the run file, 9 steps of 384 tokens; the budget gives 20."""
    arms = {"ce": ["method=ce"], "kd": ["method=kd", FALLS.format(7680)]}
    compare.main([write(arms=arms, seeds=[0])])
    assert started[0] == ["ce_seed0", "kd_seed0"]
    with pytest.raises(
        UserError, match=r"arms.kd: .*over_tokens must be at most the tokens of stage II \(7680\), but is"
    ):
        compare.main([write(arms={**arms, "kd": ["method=kd", FALLS.format(7681)]}, seeds=[0])])
    assert len(started[0]) == 2


@pytest.mark.parametrize(
    ("key", "weight"),
    [
        ("over_tokens", FALLS.format(768)),
        ("on_after_tokens", "loss.kl={start=1, on_after_tokens=768}"),
        ("off_after_tokens", "loss.kl={start=1, off_after_tokens=768}"),
    ],
)
def test_a_schedule_in_tokens_has_no_price_in_seconds(write, key, weight):
    with pytest.raises(UserError, match=rf"arms.kd must have its loss.kl in fractions with a .* but has {key}, which"):
        plans.load(write(arms={"ce": ["method=ce"], "kd": ["method=kd", weight]}, budget={"seconds": 60.0}))
    assert plans.load(write(arms={"ce": ["method=ce", weight]}, budget={"seconds": 60.0}))


def test_a_budget_of_seconds_pays_for_stage_i_and_validation(write):
    plan = plans.load(write(budget={"seconds": 60.0}))
    price = Price(filter_step=2.0, step=3.0, validation=1.0, first_validation=8.0)  # with the teacher's
    assert prices.steps_within(plan, "ce", {"ce": price}) == (60 - 8 - 4) // 3
    assert prices.steps_within(plan, "ted", {"ted": price}) == (60 - 8 - 4 - 4 * 2) // 3
    run = plans.of_arm(plan, "ted")
    assert prices.seconds_at(plan, "ted", price, run, 6, 3) == 4 * 2 + 2 * 3 + 8 + 2
    assert prices.seconds_at(plan, "ted", price, run, 3, 0) == 3 * 2


@pytest.mark.parametrize("most", [1, 3, 4])
def test_a_run_validates_no_more_often_than_its_budget_pays_for(write, most):
    plan = plans.load(write(validations=most))
    for steps in range(1, 60):
        for arm, stage_i in (("ce", 0), ("ted", 4)):
            run = load_run(plan.run, plans.job_of(plan, arm, 0, steps).words)
            stage = stages_of(run)[-1]
            found = [step for step in range(stage_i + 1, stage_i + steps + 1) if stage.validates(step)]
            assert min(most, steps) / 2 <= len(found) <= most and found[-1] == stage_i + steps


def test_a_budget_of_steps_is_the_seconds_that_they_take_in_their_arm(write):
    """Stage I is inside, validation is not."""
    plan = plans.load(write(budget={"steps": 10, "of": "kd"}))
    known = {"ce": Price(0.0, 2.0, 9.0, 9.0), "kd": Price(0.0, 3.0, 9.0, 9.0), "ted": Price(2.0, 4.0, 9.0, 9.0)}
    assert {arm: prices.steps_within(plan, arm, known) for arm in known} == {"ce": 15, "kd": 10, "ted": 5}
    assert prices.seconds_at(plan, "kd", known["kd"], plans.of_arm(plan, "kd"), 10, 5) == 30.0


def test_seconds_that_an_arm_spent_before_its_run_are_missing_in_its_budget(write):
    known = {"ce": Price(0.0, 2.0, 1.0, 1.0), "kd": Price(0.0, 3.0, 1.0, 1.0)}
    for budget, steps in (({"steps": 10, "of": "kd"}, (30 - 9) // 2), ({"seconds": 60.0}, (60 - 9 - 5) // 2)):
        plan = plans.load(write(budget=budget, spent={"ce": 9.0}))
        assert prices.steps_within(plan, "ce", known) == steps
        assert prices.seconds_at(plan, "ce", known["ce"], plans.of_arm(plan, "ce"), 0, 0) == 9.0


def test_the_price_of_a_schedule_is_the_mean_of_its_parts(write, monkeypatch):
    """The first step of each stage compiles; what it really costs is what the second one does."""
    plan = plans.load(write(measure={"steps": 5}))
    taken = [(1, 9.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 8.0), (7, 1.0), (8, 3.0), (9, 3.0), (10, 3.0)]
    rows = [{"step": step, "perf/step_ms": 1e3 * seconds} for step, seconds in taken]
    monkeypatch.setattr(prices, "rows_in", lambda path: rows)
    monkeypatch.setattr(prices.life, "read", lambda folder: Life(10, Spent(steps=34.0, validation=4.0)))
    mean = Price(filter_step=2.0, step=2.2, validation=2.0, first_validation=2.0)
    assert prices.price_of(plan, "ted", "measure_ted_0") == mean
    rows[-1] |= {"perf/goodput": 0.68, "perf/lost_validation": 0.06}  # 3 of the 50 seconds until then
    apart = mean._replace(validation=pytest.approx(1.0), first_validation=pytest.approx(3.0))
    assert prices.price_of(plan, "ted", "measure_ted_0") == apart


def test_a_run_that_another_budget_began_is_not_gone_on_with(write, tmp_path):
    """It would follow one schedule up to the stop and another from there on."""
    plan = plans.load(write(budget={"tokens": 7680}))
    begun = plan.place / "runs" / "ce_seed0" / "run.toml"
    begun.parent.mkdir(parents=True)
    begun.write_text("[train]\nsteps = 30\n")
    with pytest.raises(
        UserError, match="was begun with 30 steps and not 20: its schedules would be of both; remove it"
    ):
        compare.refuse_other_steps(plan, {"ce": 20, "ted": 16})


# Differences


def test_the_interval_of_paired_differences_is_that_of_student_s_t():
    rng = numpy.random.default_rng(0)
    for count in range(2, plans.MOST_SEEDS + 1):
        ours, theirs = rng.normal(size=(2, count))
        found = results.paired(dict(enumerate(ours)), dict(enumerate(theirs)))
        spread = (ours - theirs).std(ddof=1) / numpy.sqrt(count)
        assert found.mean == pytest.approx((ours - theirs).mean())
        assert inside(found.half / spread, count - 1) == pytest.approx(0.95, abs=4e-5)


def inside(t: float, freedom: int) -> float:
    """The share of Student's distribution within ±t, by summing its density."""
    x = numpy.linspace(0, t, 200_001)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return 2 * norm * float(numpy.trapezoid(density, x))


def test_only_seeds_that_both_arms_finished_are_paired():
    assert results.paired({0: 1.0, 1: 2.0}, {1: 1.5, 2: 9.0}) == (0.5, None)
    assert results.paired({0: 1.0}, {1: 1.0}) is None


def test_the_least_loss_of_a_run_may_count_and_never_that_before_training(write):
    def result(arm, *losses, first=0):
        points = [results.Point(step, 8 * step, None, loss) for step, loss in enumerate(losses, first)]
        return results.Result(arm, 0, len(losses), "done", 1.0, "c0ffee", points)

    found = [result("ce", 1.0, 4.0, 7.0), result("kd", 1.0, 6.0, 5.0)]
    last, least = (results.table(plans.load(write(judged_by=by)), found) for by in ("last", "least"))
    assert "7.0000" in last and "-2.0000" in last
    assert "4.0000" in least and "+1.0000" in least
    late = [found[0], result("kd", 3.0, 6.0, 5.0, first=1)]  # a program that does not validate before it trains
    assert "-1.0000" in results.table(plans.load(write(judged_by="least")), late)
    assert [loss for _, loss in results.mean_curve(late[1:], "tokens", 0)] == [3.0, 6.0, 5.0]


def test_a_curve_is_drawn_where_all_seeds_of_an_arm_validated():
    def result(seed, steps):
        points = [results.Point(step, 8 * step, None, 9.0 - step - seed) for step in steps]
        return results.Result("ce", seed, 6, "done", 1.0, "c0ffee", points)

    found = [result(0, [0, 2, 4, 6]), result(1, [0, 3, 6])]
    assert results.mean_curve(found, "tokens", 0) == [(48, 2.5)]
    assert (
        results.mean_curve(found[:1], "step", 0) == [(2, 7.0), (4, 5.0), (6, 3.0)]
        and results.mean_curve([], "step", 0) == []
    )


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [(-0.2, 0.1, "better"), (0.2, 0.1, "worse"), (0.1, 0.2, "noise"), (1.0, None, "one seed")],
)
def test_what_is_within_the_interval_is_called_noise(mean, half, verdict):
    assert Difference(mean, half).verdict == verdict


# A comparison as a whole


@pytest.fixture
def started(monkeypatch):
    """The names of runs that were started; each writes losses that its arm and seed decide, unless its code is another."""
    names, codes = [], {}

    def run_all(plan, jobs):
        for job in jobs:
            if codes.get(job.name) == "interrupt":
                raise KeyboardInterrupt
            names.append(job.name)
            settings = dict(word.split("=", 1) for word in job.words)
            stand_in(plan.place / "runs" / job.name, settings, codes.get(job.name, 0))
            yield job, codes.get(job.name, 0)

    monkeypatch.setattr(starts, "run_all", run_all)
    return names, codes


STEP_MS = {"ce": 100.0, "kd": 200.0, "ted": 400.0}


def stand_in(folder, settings, code):
    folder.mkdir(parents=True, exist_ok=True)
    method, stage_i = settings["method"], int(settings.get("filters.steps", 0))
    total, every = stage_i + int(settings["train.steps"]), int(settings["validation.every"]) or 10**9
    loss = 5 - {"ce": 0.0, "kd": 0.1, "ted": 0.2}[method] + int(settings.get("seed", 0)) / 10
    rows = []
    for step in range(1, total + 1):
        cost = 50.0 if step <= stage_i else STEP_MS[method]
        rows.append({"step": step, "tokens": step * 384, "perf/step_ms": 9e9 if step in (1, stage_i + 1) else cost})
        if step > stage_i and (step % every == 0 or step == total):
            rows.append({"step": step, "tokens": step * 384, "val/loss": loss + (total - step) / total})
    rows.insert(0, {"step": stage_i, "tokens": stage_i * 384, "val/loss": 9.0})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    life.write(
        folder, Life(total, Spent(steps=total / 10, validation=0.6), "loss/ce is not finite" if code else "it was done")
    )


def test_arms_take_the_steps_that_their_budget_of_seconds_holds(write, started):
    path = write(budget={"seconds": 12.0}, seeds=[0, 1])
    compare.main([path])
    plan = plans.load(path)
    # 5 validations of 0.3 s; 4 steps of stage I of 0.05 s each.
    assert {r.arm: r.steps for r in results.noted(plan)} == {"ce": 105, "kd": 52, "ted": 25}
    table = (plan.place / "table.md").read_text()
    assert "| ce | 2 | 105 | 11 | 5.0500 | 0.0707 | - |  |" in table
    assert "| kd | 2 | 52 | 6 | 4.9500 | 0.0707 | -0.1000 ± 0.0000 | better |" in table
    assert (plan.place / "curves.csv").read_text().splitlines()[1].startswith("ce,0,0,0,0.0,9.0,")
    assert (plan.place / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_that_was_interrupted_goes_on_and_repeats_nothing(write, started):
    names, codes = started
    path = write(seeds=[0, 1])
    codes["ted_seed0"] = "interrupt"
    with pytest.raises(KeyboardInterrupt):
        compare.main([path])
    codes.clear()
    compare.main([path])
    assert names == ["ce_seed0", "kd_seed0", "ted_seed0", "ce_seed1", "kd_seed1", "ted_seed1"]
    compare.main([path])
    assert len(names) == 6
    with pytest.raises(
        UserError, match=r"out must have results of this budget, but ce_seed0 took 20 steps and not 40; give "
    ):
        compare.main([write(seeds=[0, 1], budget={"tokens": 15_360})])


def test_runs_that_measure_are_not_repeated_either(write, started):
    names, codes = started
    path = write(budget={"seconds": 12.0}, seeds=[0], measure={"rounds": 2})
    codes["measure_kd_1"] = "interrupt"
    with pytest.raises(KeyboardInterrupt):
        compare.main([path])
    codes.clear()
    compare.main([path])
    measured = [name for name in names if name.startswith("measure")]
    assert measured == [f"measure_{arm}_{turn}" for turn in (0, 1) for arm in ARMS]


def test_a_run_that_measured_other_words_is_measured_again(write, started):
    names, codes = started
    codes["measure_kd_0"] = "interrupt"
    with pytest.raises(KeyboardInterrupt):
        compare.main([write(budget={"seconds": 12.0}, seeds=[0])])
    codes.clear()
    compare.main([write(budget={"seconds": 12.0}, seeds=[0], set=["data.prefetch=3"])])
    assert names.count("measure_ce_0") == 2


def test_an_arm_whose_rate_is_too_high_is_measured_without_it(write):
    """It diverges in runs of its own, where it is named."""
    plan = plans.load(write(budget={"seconds": 9.0}, set=["train.lr=9.0", "train.min_lr=1.0", "filters.lr=9.0"]))
    for arm in ARMS:
        run = load_run(plan.run, plans.measuring_job(plan, arm, 0).words)
        assert max(run.train.lr, run.train.min_lr, run.filters.lr) < 1e-6
    frozen = plans.load(write(budget={"seconds": 9.0}, arms={"still": ["filters.steps=0", "filters.lr=0"]}))
    assert load_run(frozen.run, plans.measuring_job(frozen, "still", 0).words).filters.lr == 0


def test_an_arm_that_diverges_is_named_and_the_others_go_on(write, started, capsys):
    names, codes = started
    codes["kd_seed0"] = NUMBERS
    compare.main([write(seeds=[0, 1])])
    assert len(names) == 6
    said = capsys.readouterr().out
    assert "kd_seed0: diverged: loss/ce is not finite" in said
    assert "| kd | 1 | 20 | 3 | 5.0000 | - | -0.1000 | one seed; diverged: loss/ce is not finite |" in said


def test_a_run_that_fails_otherwise_ends_the_comparison_with_its_output_named(write, started):
    started[1]["ce_seed0"] = 5
    with pytest.raises(
        RunStopped, match=r"^ce_seed0 ended with exit code 5; look into .*said/ce_seed0.txt, then give the same"
    ):
        compare.main([write()])


def test_a_mistake_that_only_a_plan_of_a_run_shows_is_found_before_any_run(write, started, root):
    with pytest.raises(UserError, match=r"^arms.kd: teacher.path must "):
        compare.main([write(arms={"ce": ["method=ce"], "kd": ["method=kd", f"teacher.path={root / 'nowhere'}"]})])
    assert not started[0]


def test_runs_that_do_not_fit_into_memory_together_are_refused_before_any(write, started, monkeypatch):
    monkeypatch.setattr(capacity, "of_the_host", lambda: 2**20)
    monkeypatch.setattr(starts, "device_count", lambda: 0)
    with pytest.raises(
        UserError, match=r"^at_once must leave each run its memory, but is 2, which may need .* GiB of 0.0"
    ):
        compare.main([write(at_once=2)])
    assert not started[0]
    compare.main([write(seeds=[0])])  # one alone is for the run to try


def test_arms_are_checked_in_folders_of_their_own(write, started, tmp_path, monkeypatch):
    """The run file's own folder may hold a finished run of another method, which none of them resumes."""
    from ted_scale import plan as of_runs

    folders, make_plan = [], of_runs.make_plan
    monkeypatch.setattr(of_runs, "make_plan", lambda run, world: folders.append(run.folder) or make_plan(run, world))
    compare.main([write(seeds=[3])])
    assert folders == [tmp_path / "out" / "runs" / f"{arm}_seed3" for arm in ARMS]


@pytest.mark.parametrize("budget", [{"tokens": 7680}, {"seconds": 12.0}], ids=["tokens", "seconds"])
def test_a_run_file_that_keeps_its_best_checkpoint_can_be_compared(write, started, root, budget):
    """Its validations are those of the comparison, which need not be steps that are saved."""
    best = {"every": 4, "best": "val/loss", "best_is": "lowest"}
    train = {"steps": 9, "tokens_per_step": 384, "precision": "fp32", "lr": 1e-3}
    write_run(root / "best.toml", make_run(root, train=train, validation={"every": 4}, checkpoint=best))
    path = write(run=str(root / "best.toml"), budget=budget, seeds=[0])
    plan = plans.load(path)
    compare.main([path])
    assert "ted_seed0" in started[0]
    for job in (plans.job_of(plan, "ted", 0, 9), plans.measuring_job(plan, "ted", 0)):
        run = load_run(plan.run, job.words)
        assert (run.checkpoint.best, run.checkpoint.best_is, run.checkpoint.every) == ("", None, 4)


@pytest.mark.parametrize("budget", [{"tokens": 7680}, {"seconds": 12.0}], ids=["tokens", "seconds"])
def test_words_of_the_comparison_that_no_run_takes_are_refused_before_any_run(write, started, monkeypatch, budget):
    monkeypatch.setattr(plans, "without_best", lambda run: ["checkpoint.every=0"])
    with pytest.raises(UserError, match=r"^arms.ce: --set checkpoint.every: "):
        compare.main([write(budget=budget)])
    assert not started[0]


def test_a_program_that_is_not_there_is_found_before_any_run(write, started):
    with pytest.raises(
        UserError, match=r"^programs.kd must be a file, .*, but 'tools/mine.py' is none; correct its path$"
    ):
        compare.main([write(programs={"kd": "tools/mine.py"})])
    assert not started[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_ends_a_comparison_with_its_runs_also_in_the_background(write, monkeypatch, number):
    """A shell has what it starts in the background ignore SIGINT; SIGTERM alone would leave the run that is going on."""
    before = signal.signal(number, signal.SIG_IGN)
    monkeypatch.setattr(starts, "run_all", lambda plan, jobs: [os.kill(os.getpid(), number)] * 0)
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.main([write()])
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_comparisons_may_go_on_beside_each_other(write, monkeypatch, ranks):
    """Each run with a launcher has a port of its own; a rank without one finds its port itself."""
    commands = []
    monkeypatch.setattr(starts.subprocess, "Popen", lambda command, **of: commands.append(command) or Ended())
    plan = plans.load(write(ranks=ranks))
    for _ in range(2):
        assert next(iter(starts.run_all(plan, [plans.job_of(plan, "ce", 0, 3)])))[1] == 0
    if ranks == 1:
        assert [command[3:6] for command in commands] == [[sys.executable, "-m", "ted_scale.commands.pretrain"]] * 2
    else:
        assert len({command[command.index("--master_port") + 1] for command in commands}) == 2
        assert all(command[command.index("--module") + 1] == "ted_scale.commands.pretrain" for command in commands)


def test_a_run_does_not_outlive_a_comparison_that_was_killed(tmp_path):
    """It would go on training in a folder that the next start of the comparison needs. A launcher may be above its ranks that
    ends without a word to them."""
    ranks = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    run = [sys.executable, str(starts.TIED)], [sys.executable, "-c", ranks]
    starting = f"import os, subprocess, time; subprocess.Popen([*{run[0]}, str(os.getpid()), *{run[1]}], start_new_session=True)"
    comparison = subprocess.Popen([sys.executable, "-c", f"{starting}; time.sleep(60)"])
    try:
        while len(started := psutil.Process(comparison.pid).children(recursive=True)) < 3:
            time.sleep(0.05)
        assert all(process.is_running() for process in started)
    finally:
        comparison.kill()
    assert psutil.wait_procs(started, 30)[1] == [] and comparison.wait() == -signal.SIGKILL


def test_a_tied_command_has_its_own_exit_code():
    words = [sys.executable, str(starts.TIED), str(os.getpid()), sys.executable, "-c"]
    codes = [
        subprocess.call([*words, code], start_new_session=True)
        for code in ("raise SystemExit(3)", "import os; os.abort()")
    ]
    assert codes == [3, 128 + signal.SIGABRT]


def test_a_run_that_begins_while_the_comparison_ends_is_ended_too(write, monkeypatch):
    """The next run begins as soon as one has ended; if that one failed, nobody waits for the next."""
    asked, begins, ended = threading.Event(), threading.Event(), threading.Event()

    class Going:
        def wait(self) -> int:
            return not ended.wait(3)

    def popen(command, **of):
        if "name=ce_seed0" in command:
            return Ended()
        asked.set()
        begins.wait(3)
        return Going()

    monkeypatch.setattr(starts.subprocess, "Popen", popen)
    monkeypatch.setattr(starts, "end_session", lambda process: ended.set())
    plan = plans.load(write())
    runs = starts.run_all(plan, [plans.job_of(plan, arm, 0, 3) for arm in ("ce", "kd")])
    next(runs)
    assert asked.wait(30)  # one that has not begun is not begun any more
    threading.Timer(0.2, begins.set).start()
    runs.close()
    assert ended.is_set()


def test_all_runs_that_go_on_are_ended_with_their_comparison(write, monkeypatch):
    class Going:
        def __init__(self):
            self.ended = threading.Event()
            going.append(self)

        def wait(self) -> int:
            return not self.ended.wait(3)

    going: list[Going] = []
    monkeypatch.setattr(starts.subprocess, "Popen", lambda command, **of: Going())
    # A run that has ended leaves the list of those that go on before the next one is looked at.
    monkeypatch.setattr(starts, "end_session", lambda process: [process.ended.set(), time.sleep(0.2)])
    monkeypatch.setattr(starts, "as_completed", lambda waits: [time.sleep(0.2), 1 / 0])
    plan = plans.load(write(at_once=2))
    with pytest.raises(ZeroDivisionError):
        list(starts.run_all(plan, [plans.job_of(plan, arm, 0, 3) for arm in ("ce", "kd")]))
    assert [process.ended.is_set() for process in going] == [True, True]


class Ended:
    """In the place of a process that was started."""

    def wait(self) -> int:
        return 0


@pytest.mark.soak
def test_real_runs_of_a_comparison_start_alike_and_end_within_their_seconds(write):
    path = write(arms={"ce": ["method=ce"], "ted": ARMS["ted"]}, budget={"seconds": 8.0}, seeds=[0], at_once=2)
    compare.main([path])
    found = {r.arm: r for r in results.noted(plans.load(path))}
    assert found["ce"].points[0].loss == pytest.approx(found["ted"].points[0].loss, rel=1e-6)
    assert all(r.end == "done" and r.seconds < 2 * 8 for r in found.values())
    assert found["ce"].steps > found["ted"].steps


@pytest.mark.soak
def test_plain_torch_and_the_trainer_take_the_same_steps(write, root):
    """Row 0 of the speedrun reads what kd reads, at the same rates, and is judged by the same text. A student without dropout,
    which plain torch has where a model has it."""
    make_model(root / "without_dropout", "llama", num_hidden_layers=2, seed=1)
    path = write(
        set=[f"student.path={root / 'without_dropout'}"],
        arms={"kd": ["method=kd"], "plain": ["method=kd"]},
        programs={"plain": "tools/bench/plain_kd.py"},
        seeds=[0],
    )
    compare.main([path])
    kd, plain = results.noted(plans.load(path))
    assert [p.loss for p in plain.points] == pytest.approx([p.loss for p in kd.points], rel=1e-4)
