"""Answers that a student writes in training: as lm-eval has the exported model write them, and as long as any rank needs."""

import importlib.util
import json

import pytest
import torch
import torch.distributed as dist
from judged import TEXTS, make_judged, make_written

from ted_scale.base.errors import Preempted
from ted_scale.commands import task
from ted_scale.config.method import Validation
from ted_scale.evaluation import greedy, suites, turns

CPU = torch.device("cpu")


def sums(calls):
    """The likeliest token is the sum of the last two."""

    def logits(batch, at_B):
        calls.append(1)
        each, tokens = torch.arange(len(at_B)), batch.tokens_BT
        return torch.nn.functional.one_hot((tokens[each, at_B] + tokens[each, at_B - 1]) % 16, 16).float()

    return logits


def test_each_row_goes_on_from_its_own_end_until_all_have_ended():
    calls = []
    found = greedy.answers(sums(calls), [[1, 2], [1, 2, 3, 5]], 100, lambda ids: 13 in ids, CPU)
    assert [row[:4] for row in found] == [[3, 5, 8, 13], [8, 13, 5, 2]] and len(calls) == greedy.LOOK_TOKENS
    assert greedy.answers(sums([]), [[1, 2]], 3, lambda ids: False, CPU) == [[3, 5, 8]]


def test_a_rank_that_has_ended_makes_as_many_forwards_as_the_one_that_writes_longest(monkeypatch):
    calls, other_rank = [], iter([False, True] * 3 + [False, False])  # at each look: asked to stop, still writing
    monkeypatch.setattr(greedy.agree, "anywhere", lambda flag, device: next(other_rank) or flag)
    assert greedy.answers(sums(calls), [[1, 2]], 3, lambda ids: False, CPU)[0] == [3, 5, 8]
    assert len(calls) == 3 * greedy.LOOK_TOKENS


def test_a_signal_ends_the_writing_on_all_ranks(monkeypatch):
    monkeypatch.setattr(greedy.agree, "anywhere", lambda flag, device: True)
    with pytest.raises(Preempted):
        greedy.answers(sums([]), [[1, 2]], 3, lambda ids: True, CPU)


def test_a_batch_is_answered_in_one_way_the_longest_first():
    asked = [("b", 3), ("a", 1), ("b", 5), ("a", 2), ("b", 4)]
    assert turns.batches_of_prompts(asked, 2) == [[3, 1], [2, 4], [0]]


class Whole:
    """A student that one process has whole."""

    device = CPU

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM

        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, batch, *_, at=None):
        logits = self.network(batch.tokens_BT).logits
        return logits if at is None else logits[torch.arange(len(logits)), at]

    def eval(self):
        return self

    train = eval


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs pip install -e '.[eval]'")
def test_the_judge_in_training_is_lm_eval_s_own_on_the_export(tmp_path):
    """Exact match, F1 and accuracy, over prompts of many lengths; and what was written is the same text."""
    from lm_eval import simple_evaluate

    from ted_scale.evaluation import live
    from ted_scale.evaluation.scores import scores
    from ted_scale.models.inspection import inspect

    root = make_judged(tmp_path)
    (root / "tasks").mkdir()
    make_written(root / "tasks")
    data = root / "sst2.jsonl"
    data.write_text("".join(json.dumps({"sentence": text[:60], "label": n % 2}) + "\n" for n, text in enumerate(TEXTS)))
    task.main(["sst2", "--data", str(data), "--out", str(root / "tasks/sst2")])
    names = ["squad_held_out", "sst2_split"]

    index, asked = suites.load(names, root / "tasks", run_code=False)
    theirs = simple_evaluate(
        model="hf", model_args={"pretrained": str(root / "one"), "dtype": "float32"}, tasks=list(asked.specs),
        task_manager=index, batch_size=4, device="cpu", limit=50, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    written = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tasks = suites.load_for_training(names, root / "tasks", 50, 128)
        judge = tasks["tasks"]["squad_held_out"].config
        score, judge.process_results = (
            judge.process_results,
            lambda doc, found: written.append(found[0]) or score(doc, found),
        )
        settings = Validation(suite=names, suite_limit=50, suite_batch=4)
        ours = live.ask(tasks, Whole(root / "one"), inspect("student.path", str(root / "one")), root / "one", settings)
    finally:
        dist.destroy_process_group()
    texts = [sample["resps"][0][0] for sample in theirs["samples"]["squad_held_out"]]
    assert written == texts and len({*texts}) > 1
    values = {score.key: score.value for score in ours}
    assert values == {score.key: score.value for score in scores(theirs)}
    assert values.keys() == {f"squad_held_out/{m}" for m in ("exact_match", "f1")} | {
        "sst2_split/acc",
        "sst2_split/acc_norm",
    }
