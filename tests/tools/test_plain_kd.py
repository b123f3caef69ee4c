"""tools/bench/plain_kd.py: an arm of plain torch leaves what a comparison reads of a run."""

import pytest
import torch
import torch.distributed as dist
from tiny import make_corpus, make_model, make_run
from transformers import AutoModelForCausalLM

from ted_scale.base.errors import NUMBERS, RunStopped, UserError
from ted_scale.checkpoints import life
from ted_scale.data.stream import open_stream, validation_batches
from ted_scale.metrics.rows import rows_in
from ted_scale.plan import make_plan
from tools.bench import plain_kd


@pytest.fixture
def run(tmp_path, monkeypatch):
    make_model(tmp_path / "teacher", "llama", hidden_size=48, num_hidden_layers=2)
    make_model(tmp_path / "student", "gpt2", num_hidden_layers=2, seed=1)
    make_corpus(tmp_path / "corpus")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr("ted_scale.ranks.group.start_ranks", lambda: torch.device("cpu"))
    train = {"steps": 12, "warmup_steps": 3, "tokens_per_step": 384, "precision": "fp32", "lr": 1e-2, "min_lr": 1e-3}
    yield make_run(tmp_path, method="kd", train=train, validation={"tokens": 512, "every": 6}, log_every=1)
    dist.destroy_process_group()


@pytest.mark.long  # trains
def test_a_comparison_reads_its_losses_rates_and_seconds(run):
    plan = make_plan(run, world=1)
    plain_kd.train(plan)
    rows = list(rows_in(run.folder / "metrics.jsonl"))
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    assert list(losses) == [0, 6, 12]
    assert losses[0] == pytest.approx(by_transformers(plan), rel=1e-5)
    assert losses[12] < losses[0] - 0.1
    steps = [row for row in rows if "perf/step_ms" in row]
    assert [row["lr"] for row in steps] == pytest.approx([1e-2 * plan.stages[-1].rate(k) for k in range(12)])
    last = life.read(run.folder)
    assert (last.step, last.words) == (12, life.DONE)  # a comparison that goes on does not measure it again
    spent = last.spent
    assert spent.steps == pytest.approx(sum(row["perf/step_ms"] for row in steps) / 1e3, rel=1e-6)
    assert spent.validation > 0


def by_transformers(plan) -> float:
    """The student's loss on the held-out text before training."""
    run, sums = plan.run, torch.zeros(2)
    model = AutoModelForCausalLM.from_pretrained(run.student.path, dtype=torch.float32)
    (held_out,) = open_stream(run.data, run.seed, plan.vocabulary).held_out.values()
    settings = {"micro_batch": 1, "rank": 0, "world": 1, "device": "cpu"}
    for batch in validation_batches(held_out, tokens=run.validation.tokens, **settings):
        with torch.no_grad():
            logits = model(batch.tokens_BT).logits[0]
        labels = batch.labels_BT[0]
        sums += torch.tensor([torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), (labels >= 0).sum()])
    return float(sums[0] / sums[1])


@pytest.mark.parametrize(
    ("section", "value", "sentence"),
    [
        ("loss", {"kl": 3.0}, r"^loss.kl must be 1.0 for plain torch, but is 3.0; change it for this arm$"),
        ("loss", {"divergence": "jsd"}, r"^loss.divergence must be forward for plain torch, but is 'jsd'"),
        ("teacher", {"every": 2}, r"^teacher.every must be 1 for plain torch, but is 2"),
        ("data", {"attention": "document"}, r"^data.attention must be causal for plain torch, but is 'document'"),
    ],
)
def test_what_plain_torch_does_not_do_is_refused(run, section, value, sentence):
    """Else it would stand in a table as an arm that did it."""
    changed = getattr(run, section).model_copy(update=value)
    with pytest.raises(UserError, match=sentence):
        plain_kd.refuse(run.model_copy(update={section: changed}))


def test_another_method_several_ranks_and_a_trained_run_are_refused(run, monkeypatch):
    with pytest.raises(UserError, match=r"^method must be kd for plain torch, but is 'ted'"):
        plain_kd.refuse(run.model_copy(update={"method": "ted"}))
    plain_kd.refuse(run)
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"^WORLD_SIZE must be 1 for plain torch"):
        patched.setenv("WORLD_SIZE", "2")
        plain_kd.refuse(run)
    (run.folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="must be no folder of a trained run, but has checkpoints"):
        plain_kd.refuse(run)


def test_a_run_that_diverges_stops_with_the_code_that_names_it(run):
    """A comparison would take a NaN for its result."""
    wild = run.model_copy(update={"train": run.train.model_copy(update={"lr": 1e30})})
    with pytest.raises(RunStopped, match=r"^loss/total must be finite, but is not in step ") as raised:
        plain_kd.train(make_plan(wild, world=1))
    assert raised.value.exit_code == NUMBERS
    assert life.read(run.folder).words.startswith("loss/total must be finite")
