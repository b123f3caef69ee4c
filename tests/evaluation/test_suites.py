"""Suites and their files, and the suite that a run asks its student in training.

lm-eval itself is needed by the last tests only, which are skipped where it is not installed.
"""

import contextlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from judged import VOCABULARY, make_judged, make_tasks, make_written
from launching import run_ranks
from tiny import PRETRAIN, make_model, make_run, write_run

from ted_scale import plan as planning
from ted_scale import validate as validation
from ted_scale.base.errors import Preempted, UserError
from ted_scale.checkpoints.progress import Progress
from ted_scale.commands import evaluate, export_hf
from ted_scale.distill.stages import Stage
from ted_scale.evaluation import suites, turns
from ted_scale.evaluation.scores import Score, scores
from ted_scale.evaluation.suites import Asked
from ted_scale.metrics.line import shown
from ted_scale.metrics.metrics import Metrics
from ted_scale.metrics.rows import rows_in
from ted_scale.plan import make_plan


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_judged(tmp_path_factory.mktemp("suites"))


def entry(name="TASK", tags=(), **cfg):
    return SimpleNamespace(kind=SimpleNamespace(name=name), cfg=cfg, tags=set(tags), yaml_path=Path("tasks/task.yaml"))


def writes(**way):
    return entry(output_type="generate_until", generation_kwargs=way)


class Index:
    """Stands in for lm-eval's index of tasks."""

    def __init__(self, **entries):
        self.task_index = entries

    def load(self, names):
        return {"tasks": {name: name for name in names}}


def local(name):
    return entry(dataset_kwargs={"data_files": {"test": f"{name}.jsonl"}})


@pytest.fixture
def load(tmp_path, monkeypatch):
    """suites.load over a folder in which some tasks are defined and some have data."""

    def to(*wanted, tasks, data=(), run_code=False, folder=tmp_path):
        monkeypatch.setattr(suites, "index_of", lambda folder, keys: Index(**tasks))
        for name in data:
            (tmp_path / f"{name}.jsonl").touch()
        return suites.load(list(wanted), folder, run_code)[1]

    return to


SMALL = {name: local(name) for name in ("lambada_openai", "arc_easy", "piqa")}


def test_a_suite_takes_blimp_where_its_files_are_at_hand(load):
    blimp = {"blimp": entry("GROUP", task=["blimp_a", "blimp_b"]), "blimp_a": local("a"), "blimp_b": local("b")}
    assert load("small", tasks=SMALL, data=SMALL).specs == list(SMALL)
    assert load("small", tasks=SMALL | blimp, data=["a", "b"]).specs == [*SMALL, "blimp"]


def test_a_suite_without_its_files_is_refused_by_name_and_place(load, tmp_path):
    with pytest.raises(
        UserError, match=rf"suite small must find the data of task piqa, but {tmp_path}/piqa.jsonl is not"
    ):
        load("small", tasks=SMALL, data=["lambada_openai", "arc_easy"])
    sentence = rf"suite ted_public must find the task gsm8k in {tmp_path}, but no file there defines it; put gsm8k.yaml"
    with pytest.raises(UserError, match=sentence):
        load("ted_public", tasks=SMALL)
    group = {
        "both": entry("GROUP", task=["arc_easy", {"group": "inner"}]),
        "inner": entry("TAG", tags=["far"]),
        "far": local("x"),
    }
    with pytest.raises(UserError, match=r"--suite must find the data of task far, but .*x.jsonl is not there"):
        load("both", tasks=SMALL | group, data=SMALL)


def test_a_name_that_is_no_task_is_refused(load):
    with pytest.raises(
        UserError, match=r"--suite must name suites \(ted_public, ted_paper, small\) or tasks .*, but arc_esy is"
    ):
        load("arc_esy", tasks=SMALL, folder=None)


def test_code_runs_only_where_it_is_asked_for_and_with_its_metric(load, tmp_path):
    tasks = {**SMALL, "humaneval": entry(unsafe_code=True)}
    assert load("arc_easy", "humaneval", tasks=tasks, data=SMALL) == Asked(["arc_easy"], ["humaneval"])
    with pytest.raises(
        UserError, match=r"task humaneval must find the code_eval metric, but .*code_eval/code_eval.py is not"
    ):
        load("humaneval", tasks=tasks, run_code=True)
    (tmp_path / "code_eval").mkdir()
    (tmp_path / suites.METRIC).touch()
    assert load("humaneval", tasks=tasks, run_code=True) == Asked(["humaneval"], [])


def test_lm_eval_is_asked_for_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(
        UserError, match=r'lm-eval must be installed for --suite, but is not; pip install -e ".\[eval\]"'
    ):
        suites.load(["small"], None, run_code=False)


def test_scores_are_those_of_groups_and_filters_by_name():
    found = {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.01},
            "mmlu_anatomy": {"alias": " - anatomy", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "gsm8k": {"exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": "N/A"},
        },
        "group_subtasks": {"mmlu": ["mmlu_anatomy"], "gsm8k": []},
    }
    assert scores(found) == [
        Score("mmlu", "acc", 0.25, 0.01),
        Score("gsm8k", "exact_match strict-match", 0.0, None),
    ]


# In training


def turn(batches, rank: int, world: int, monkeypatch) -> tuple[list, dict]:
    """(the batches that a rank reads, what it has to tell the others)"""
    read, told = [], {}
    monkeypatch.setattr(turns.agree, "share", lambda: (rank, world))
    monkeypatch.setattr(turns.agree, "anywhere", lambda flag, device: flag)
    monkeypatch.setattr(turns.agree, "gather", lambda mine: told.update(mine) or [mine])

    def answer(numbers):
        read.append(numbers)
        return [f"answer {number}" for number in numbers]

    with contextlib.suppress(KeyError):  # there is nobody to tell it the other ranks' answers
        turns.answered(batches, answer, None)
    return read, told


def test_ranks_read_as_many_batches_each_and_every_request_once(monkeypatch):
    requests = [(None, list(range(2 + n % 5)), [n, n + 1]) for n in range(21)]
    batches = turns.batches_of(requests, 4)
    assert sorted(number for batch in batches for number in batch) == list(range(21)) and len(batches) == 6
    for world in (1, 2, 4, 5, 8):
        ranks = [turn(batches, rank, world, monkeypatch) for rank in range(world)]
        assert {len(read) for read, _ in ranks} == {math.ceil(6 / world)}
        everyone = {number: answer for _, told in ranks for number, answer in told.items()}
        assert everyone == {number: f"answer {number}" for number in range(21)}


def test_a_signal_on_any_rank_ends_the_turns_of_all(monkeypatch):
    monkeypatch.setattr(turns.agree, "share", lambda: (0, 2))
    monkeypatch.setattr(turns.agree, "anywhere", lambda flag, device: True)
    with pytest.raises(Preempted):
        turns.answered([[0], [1]], lambda numbers: pytest.fail("nothing may be read"), None)


def test_answers_of_one_token_to_one_text_share_a_row():
    text, other = [5, 6, 7], [5, 6]
    requests = [("", text, [1]), ("", other, [9]), ("", text, [2]), ("", text, [1, 2]), ("", text, [3])]
    assert turns.batches_of(requests, 1) == [[3], [0, 2, 4], [1]]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (writes(max_gen_toks=8), r"validation.suite_limit must be set .* as for gsm8k, but is not"),
        (writes(until=["."]), r"say how many, but gsm8k has no max_gen_toks above 0; give"),
        (writes(max_gen_toks=8, do_sample=True), r"write the likeliest tokens .* but gsm8k has do_sample = true;"),
        (writes(max_gen_toks=8, temperature=0.7), r"write the likeliest tokens .* but gsm8k has temperature = 0.7;"),
        (writes(max_gen_toks=8, num_beams=1, repetition_penalty=1.2), r" but gsm8k has repetition_penalty = 1.2;"),
        (writes(max_gen_toks=8, max_length=9, num_beams=4), r" but gsm8k has max_length = 9, num_beams = 4;"),
        (writes(max_gen_toks=128), r"max_gen_toks of task gsm8k must be below the 128 tokens .*, but is 128; lower"),
        (entry(output_type="generate_until", unsafe_code=True), "but gsm8k runs code that the model writes; ask"),
        (entry(name="PY_TASK"), "but gsm8k is of another kind; ask"),
    ],
)
def test_training_refuses_tasks_that_have_no_bound_or_run_code(monkeypatch, tmp_path, task, reason):
    tasks = {"gsm8k": task, "both": entry("GROUP", task=["gsm8k"])}
    monkeypatch.setattr(suites, "index_of", lambda folder, keys: Index(**tasks))
    for asked in ("gsm8k", "both"):
        with pytest.raises(UserError, match=reason):
            suites.load_for_training([asked], tmp_path, None, 128)


@pytest.mark.parametrize(
    ("wanted", "files", "sentence"),
    [
        ("small", ".", r"suite small must find the data of task piqa, but .*piqa.jsonl is not there"),
        ("piqa", ".", r"validation.suite must find the data of task piqa"),
        ("gsm8k", ".", r"validation.suite must find the task gsm8k in .*, or leave out validation.suite_files, and"),
        ("arc_esy", None, r"validation.suite must name suites .* or tasks of lm-eval, but arc_esy is neither"),
    ],
)
def test_training_is_refused_by_the_names_of_its_settings(monkeypatch, tmp_path, wanted, files, sentence):
    likely = {name: entry(**task.cfg, output_type="multiple_choice") for name, task in SMALL.items()}
    monkeypatch.setattr(suites, "index_of", lambda folder, keys: Index(**likely))
    for name in ("lambada_openai", "arc_easy"):
        (tmp_path / f"{name}.jsonl").touch()
    with pytest.raises(UserError, match=sentence):
        suites.load_for_training([wanted], files and tmp_path, None, None)


def test_a_relative_folder_is_whole_before_lm_eval_changes_directory(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(suites, "index_of", lambda folder, keys: seen.append(folder) or Index())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must find the task own"):
        suites.load_for_training(["own"], Path("tasks"), None, None)
    assert seen == [tmp_path.resolve() / "tasks"]


def test_the_members_of_a_group_are_found_however_they_are_written():
    assert suites.named_in(["a", {"group": "g"}, {"task": [{"task": "b"}, {"task": ["c"]}]}]) == ["a", "g", "b", "c"]


def run_file(root, runs=None, precision="fp32", **validation):
    corpora = [{"path": str(root / "cats"), "validation": 0.2}]
    return make_run(
        root, method="ce", student={"path": str(root / "one")}, data={"corpora": corpora, "seq_len": 16},
        train={"steps": 4, "tokens_per_step": 64, "lr": 1e-2, "precision": precision},
        validation={"tokens": 64, **validation}, runs=str(runs or root / "runs"),
    )  # fmt: skip


def test_a_run_without_lm_eval_is_refused_before_it_starts(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    sentence = r'lm-eval must be installed for validation.suite, but is not; pip install -e ".\[eval\]"'
    with pytest.raises(UserError, match=sentence):
        make_plan(run_file(root, suite="small"), 1)


def test_a_student_without_a_tokenizer_is_refused_before_it_starts(root, monkeypatch):
    make_model(root / "bare", "llama", vocab_size=VOCABULARY, num_hidden_layers=2)
    run = run_file(root, suite="small")
    bare = run.model_copy(update={"student": run.student.model_copy(update={"path": str(root / "bare")})})
    with pytest.raises(
        UserError, match=r"student.path must hold a tokenizer for validation.suite, but .*bare has none"
    ):
        make_plan(bare, 1)


def test_a_suite_is_due_at_both_ends_and_at_every_nth_validation(root):
    def steps(**validation):
        stage = Stage("student", 10, 20, run_file(root, **validation))
        return [step for step in range(10, 31) if stage.asks_suite(step)]

    assert steps(suite="small", every=4) == [10, 12, 16, 20, 24, 28, 30]
    assert steps(suite=["arc_easy", "piqa"], every=4, suite_every=2) == [10, 16, 24, 30]
    assert steps(suite="small") == [10, 30] and steps(every=4) == []
    assert not Stage("filters", 0, 10, run_file(root, suite="small")).asks_suite(0)


def test_a_resume_asks_a_suite_that_was_cut_short_and_repeats_none(root, tmp_path):
    run = run_file(root, suite="small", every=2, runs=tmp_path)
    stage, plan = Stage("student", 0, 4, run), SimpleNamespace(run=run)
    run.folder.mkdir()

    def missing(step: int, *keys) -> bool:
        rows = [{"step": 2, "tokens": 0, "val/loss": 1.0, "val/suite/piqa/acc": 0.5}, {"step": step, "tokens": 0}]
        rows += [{"step": step, "tokens": 0, key: 0.5} for key in keys]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics = Metrics(run, writes=True, total_steps=4, step=step, device=torch.device("cpu"), wandb_run=None)
        metrics.close()
        return validation.missing(plan, metrics, stage, Progress(step))

    assert missing(4) and missing(4, "val/loss") and missing(4, "val/suite/piqa/acc")
    assert not missing(4, "val/loss", "val/suite/piqa/acc") and not missing(3)


@pytest.mark.parametrize(
    ("best", "nearest"),
    [
        ("val/suite/piqa/ac", "val/suite/piqa/acc"),
        ("val/suite/pika/acc", "val/suite/piqa/acc"),
        ("val/suite/gsm8k/exact_match", "val/suite/gsm8k/exact_match_strict-match"),
    ],
)
def test_a_number_that_no_task_has_is_refused_before_anything_starts(root, monkeypatch, best, nearest):
    """Of a group, a task with a function of its own and a metric that makes several, only the answers say which there are."""

    def task(*metrics, **settings):
        return SimpleNamespace(aggregation=lambda: dict.fromkeys(metrics), dump_config=lambda: settings, eval_docs=[])

    strict = {"output_type": "generate_until", "filter_list": [{"name": "strict-match"}]}
    tasks = {
        "piqa": task("acc", "acc_norm"),
        "gsm8k": task("exact_match", **strict),
        "own": task(process_results="f"),
        "rouge": task("rouge", output_type="generate_until"),
    }
    monkeypatch.setattr(planning, "suite_in_training", lambda *_: {"tasks": tasks, "groups": {"mmlu": None}})
    run = run_file(root, suite="small", every=2)
    with pytest.raises(UserError, match=rf"^checkpoint.best must be a number of validation.suite, .* {nearest}\b"):
        make_plan(keeps(run, best), 1)
    for known in (nearest, "val/suite/mmlu/acc", "val/suite/own/any", "val/suite/rouge/rouge1", "val/loss", ""):
        assert make_plan(keeps(run, known), 1).suite


def keeps(run, best: str):
    """The run with this checkpoint.best."""
    return run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"best": best})})


def test_the_console_shows_the_scores():
    assert shown("val/suite/arc_easy/acc") and not shown("val/cats/loss")


# With lm-eval

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
)


def scores_in(folder, step: int) -> dict[str, float]:
    """As metrics.jsonl has them, each once."""
    found = {}
    for row in rows_in(folder / "metrics.jsonl"):
        asked = {key: value for key, value in row.items() if key.startswith("val/suite/")}
        assert row["step"] != step or not asked.keys() & found.keys()
        found |= asked if row["step"] == step else {}
    return found


WRITES = {
    "task": "says", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": "piqa.jsonl"}},
    "validation_split": "validation",
    "output_type": "generate_until", "doc_to_text": "{{goal}}", "doc_to_target": "{{sol1}}",
    "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"max_gen_toks": 8},
}  # fmt: skip


@needs_lm_eval
@pytest.mark.parametrize(
    ("member", "name"), [(WRITES, "both::says"), ({**WRITES, "task": "piqa"}, "piqa")], ids=["own", "changed"]
)
def test_training_needs_a_limit_for_a_task_that_only_its_group_makes_one_that_writes(tmp_path, member, name):
    """Such a task is in no file of its own: lm-eval makes it when the group is loaded."""
    folder = make_tasks(tmp_path / "tasks")
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": ["arc_easy", member]}))
    with pytest.raises(UserError, match=rf"validation.suite_limit must be set .*, as for {name}, but is not"):
        suites.load_for_training(["both"], folder, None, None)


@pytest.mark.long
@needs_lm_eval
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_in_training_are_those_of_the_export_to_the_last_bit(root, tmp_path, precision):
    """On two ranks, which share 98 questions, after some steps; and a resume asks what a kill cut off."""
    settings = {"suite": "small", "suite_files": str(make_tasks(tmp_path / "tasks")), "every": 2}
    if precision == "fp32":  # in bf16 two tokens may be equally likely with a cache alone
        make_written(tmp_path / "tasks")
        settings |= {"suite": ["small", "squad_held_out"], "suite_limit": 40}
    run = run_file(root, tmp_path / "runs", precision, **settings)
    file = write_run(tmp_path / "run.toml", run)
    run_ranks(2, PRETRAIN, "--config", str(file))
    first, last = scores_in(run.folder, 0), scores_in(run.folder, 4)
    assert first.keys() == last.keys() == scores_in(run.folder, 2).keys() and len(last) == (
        8 if precision == "fp32" else 6
    )
    assert first["val/suite/lambada_openai/perplexity"] > last["val/suite/lambada_openai/perplexity"]

    export_hf.main([str(run.folder)])
    words = ["--suite", *run.validation.suite, "--tasks", settings["suite_files"], "--device", "cpu"]
    evaluate.main([str(run.folder / "export"), *words, "--json", str(tmp_path / "scores.json")])
    (model,) = json.loads((tmp_path / "scores.json").read_text())["models"]
    assert {f"val/suite/{s['what']}/{s['metric']}": s["value"] for s in model["scores"]} == last

    rows = [row for row in rows_in(run.folder / "metrics.jsonl") if row["step"] < 4 or "val/loss" in row]
    assert all("val/suite/piqa/acc" not in row for row in rows if row["step"] == 4)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ranks(2, PRETRAIN, "--config", str(file))
    assert scores_in(run.folder, 4) == last
