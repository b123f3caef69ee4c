"""Samples of text in training: what is refused before a start, and what a step writes. Two ranks: test_distributed.py."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from sample_scenarios import make_speaker
from tiny import make_corpus, make_model, make_run
from tokenizers import Tokenizer

from ted_scale.base.errors import Preempted, UserError
from ted_scale.checkpoints.progress import Progress
from ted_scale.data.stream import open_stream
from ted_scale.distill.stages import Stage
from ted_scale.evaluation import greedy, prompts, turns
from ted_scale.metrics import samples
from ted_scale.metrics.metrics import Metrics
from ted_scale.metrics.rows import SAMPLES
from ted_scale.plan import make_plan
from ted_scale.ranks import pulse


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    make_speaker(folder / "student")
    make_model(folder / "bare", "llama", num_hidden_layers=2)
    make_corpus(folder / "corpus")
    return folder


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(turns.agree, "share", lambda: (0, 1))
    monkeypatch.setattr(turns.agree, "anywhere", lambda flag, device: flag)
    monkeypatch.setattr(turns.agree, "gather", lambda mine: [mine])
    monkeypatch.setattr(samples, "of_rank_0", lambda look, *arguments: look(*arguments))


def run_file(root, runs="runs", model="student", **asked):
    settings = {"every": 2, "prompts": ["w5 w6", "w9"], "tokens": 4, **asked}
    return make_run(
        root, method="ce", teacher=None, student={"path": str(root / model)}, train={"steps": 5}, runs=str(root / runs),
        samples=settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"prompts": ["w5", "w5 what"]}, r"samples.prompts\[1\] must be text that the student's tokenizer reads, but it is not: "),
        ({"prompts": [" "]}, r"samples.prompts\[0\] must be text .*, but has no token; write some text"),
        ({"prompts": ["w5 " * 29]}, r"samples.prompts\[0\] must have at most .* = 28 tokens, but has 29"),
        ({"model": "bare"}, r"student.path must hold a tokenizer for samples, but .*bare has none"),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_read_is_a_sentence_before_the_start(root, asked, sentence):
    with pytest.raises(UserError, match=sentence):
        make_plan(run_file(root, **asked), 1)


def test_a_prompt_of_words_that_the_models_do_not_have_is_refused(root, tmp_path):
    make_speaker(tmp_path / "student")
    path = tmp_path / "student" / "tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["vocab"]["w500"] = 500
    path.write_text(json.dumps(words))
    assert Tokenizer.from_file(str(path)).encode("w500").ids == [500]
    student = SimpleNamespace(folder=tmp_path / "student")
    plan = SimpleNamespace(run=run_file(root, prompts=["w5 w500"]), student=student, teacher=None, vocabulary=128)
    with pytest.raises(UserError, match=r"but token 500 is not among the models' 128; change the text"):
        prompts.check(plan)


@pytest.mark.parametrize(
    ("asked", "corpus", "sentence"),
    [
        ({"prompts": []}, 0.1, "every must be 0 without prompts, but is above; give prompts, or set from_validation"),
        ({"tokens": 32}, 0.1, r"samples.tokens must be below data.seq_len \(32\), but is 32"),
        ({"from_validation": 1}, 0.0, "samples.from_validation must be 0 where no corpus holds text out, but is 1"),
    ],
)
def test_what_a_run_file_asks_for_must_fit(root, asked, corpus, sentence):
    with pytest.raises(ValidationError, match=sentence):
        make_run(
            root, samples={"every": 2, "prompts": ["w5"], "tokens": 4, **asked},
            data={"corpora": [{"path": str(root / "corpus"), "validation": corpus}]},
        )  # fmt: skip


def test_samples_are_due_before_the_first_step_of_stage_ii_after_the_last_and_every_so_often(root):
    stage = Stage("student", 3, 6, run_file(root, every=4))
    assert [step for step in range(3, 10) if stage.writes_samples(step)] == [3, 4, 8, 9]
    assert not any(Stage("filters", 0, 3, run_file(root, every=1)).writes_samples(step) for step in range(4))
    assert not any(Stage("student", 0, 9, run_file(root, every=0)).writes_samples(step) for step in range(10))


def test_beginnings_of_held_out_text_are_taken_from_the_corpora_in_turn(root):
    run = run_file(root, prompts=["w5"], from_validation=3)
    plan = make_plan(run, 1)
    held_out = open_stream(run.data, run.seed, 128).held_out
    other = {**held_out, "other": held_out["corpus"]._replace(count=1)}
    found = prompts.beginnings(run, other, prompts.tokenizer_of(plan))
    first, second = (held_out["corpus"].sample(k).tokens[:28].tolist() for k in (0, 1))
    assert [prompt.ids for prompt in found] == [first, first, second]
    assert found[0].text.split()[0] == f"w{first[0]}"
    assert [prompt.ids for prompt in prompts.all_of(plan, other)] == [[5], first, second]


def test_each_token_is_the_likeliest_after_those_before_and_among_those_that_both_models_know():
    """The stand-in's likeliest token is the sum of the last two, and one beyond the vocabulary likelier still."""

    def logits(batch, at):
        tokens = batch.tokens_BT
        sums = (tokens + torch.roll(tokens, 1)) % 16
        return torch.nn.functional.one_hot(sums, 20).float()[:, at] + 2.0 * (torch.arange(20) >= 16)

    assert greedy.written(logits, [[1, 2], [1, 2, 3, 5]], 4, 16, torch.device("cpu")) == [[3, 5, 8, 13], [8, 13, 5, 2]]
    assert greedy.until([3, 5, 8, 5], 8) == [3, 5] and greedy.until([3, 5], 8) == [3, 5]


class Counter:
    """A student whose next word is one more than the last; how often it was asked, and in which mode."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls, self.training = 0, True

    def eval(self):
        self.training = False

    def train(self):
        self.training = True

    def __call__(self, batch, *_, at):
        assert not self.training
        self.calls += 1
        return torch.nn.functional.one_hot((batch.tokens_BT + 1) % 128, 128).float()[:, at]


def test_each_token_has_its_own_time_limit_and_a_signal_waits_for_no_whole_turn(monkeypatch):
    began, calls = [], 0

    def logits(batch, at):
        nonlocal calls
        calls += 1
        began.append(pulse.now)
        if calls == 3:
            monkeypatch.setattr(turns.agree, "anywhere", lambda flag, device: True)
        return torch.zeros(1, 4)

    with pytest.raises(Preempted):
        greedy.written(logits, [[1]], 100, 4, torch.device("cpu"))
    assert len({id(one) for one in began}) == calls == greedy.LOOK_TOKENS - 1


def test_a_step_writes_its_rows_once_and_their_time_is_no_step_s(root, tmp_path):
    run = run_file(root, runs=tmp_path)
    plan, student = make_plan(run, 1), Counter()
    run.folder.mkdir()
    metrics = Metrics(run, writes=True, total_steps=5, step=0, device=Counter.device, wandb_run=None)
    for step in (0, 0, 2):
        assert samples.write(plan, None, metrics, {}, student, Progress(step)) is False
    metrics.close()
    rows = [json.loads(line) for line in (run.folder / SAMPLES).read_text().splitlines()]
    of_step = [("w5 w6", "w7 w8 w9 w10"), ("w9", "w10 w11 w12 w13")]
    assert [(row["step"], row["prompt"], row["student"]) for row in rows] == [
        (s, *texts) for s in (0, 2) for texts in of_step
    ]
    assert all("teacher" not in row for row in rows)
    assert student.calls == 2 * 2 * 4 and student.training
    assert metrics.ledger.spent().samples > 0


def test_a_run_that_is_asked_to_stop_writes_no_row_and_the_next_start_does(root, tmp_path, monkeypatch):
    run = run_file(root, runs=tmp_path)
    plan, student = make_plan(run, 1), Counter()
    run.folder.mkdir()
    metrics = Metrics(run, writes=True, total_steps=5, step=0, device=Counter.device, wandb_run=None)
    monkeypatch.setattr(turns.agree, "anywhere", lambda flag, device: student.calls >= 4)
    assert samples.write(plan, None, metrics, {}, student, Progress(2)) is True
    assert student.training and not (run.folder / SAMPLES).exists()
    monkeypatch.setattr(turns.agree, "anywhere", lambda flag, device: False)
    assert samples.write(plan, None, metrics, {}, student, Progress(2)) is False
    metrics.close()
    assert len((run.folder / SAMPLES).read_text().splitlines()) == 2


def test_a_run_that_goes_back_removes_the_samples_that_it_will_write_again(root, tmp_path):
    run = run_file(root, runs=tmp_path)
    run.folder.mkdir()
    metrics = Metrics(run, writes=True, total_steps=5, step=4, device=Counter.device, wandb_run=None)
    samples.keep(run.folder / SAMPLES, [{"step": step, "prompt": "w5", "student": "w6"} for step in (0, 2, 4)])
    metrics.go_back(Progress(2))
    metrics.close()
    assert [json.loads(line)["step"] for line in (run.folder / SAMPLES).read_text().splitlines()] == [0, 2]


def test_a_full_disk_loses_samples_and_the_run_goes_on(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(samples, "log_line", said.append)
    monkeypatch.setattr(samples, "append_to", lambda path: Path("/dev/full").open("a"))  # noqa: SIM115
    samples.keep(tmp_path / SAMPLES, [{"step": 3, "prompt": "w5", "student": "w6"}])
    assert said == [
        f"{tmp_path / SAMPLES} must be writable, but is not (No space left on device): samples of step 3 are lost"
    ]


def test_a_file_that_cannot_be_read_is_as_good_as_none(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(samples, "log_line", said.append)
    path = tmp_path / SAMPLES
    path.mkdir()
    assert samples.known(path, 3) == (set(), {})

    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(samples, "rows_in", broken)
    assert samples.known(path, 3) == (set(), {})
    assert said[1] == f"{path} must be readable, but is not (Input/output error): samples of step 3 are written anew"


def test_a_file_with_a_second_name_gets_no_samples_and_the_run_goes_on(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(samples, "log_line", said.append)
    (tmp_path / "other").write_text("")
    os.link(tmp_path / "other", tmp_path / SAMPLES)
    samples.keep(tmp_path / SAMPLES, [{"step": 3, "prompt": "w5", "student": "w6"}])
    assert "hard links" in said[0] and (tmp_path / "other").read_text() == ""
