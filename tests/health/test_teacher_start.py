"""What is said of a compiled or rounded teacher before a stage trains."""

import types

import pytest
import torch
from plain import make_batch, make_world
from tiny import make_run

from ted_scale import engines
from ted_scale.base.errors import UserError
from ted_scale.checkpoints.progress import Progress
from ted_scale.config.method import Loss
from ted_scale.data.stream import open_stream
from ted_scale.distill.teacher import TeacherBody
from ted_scale.health import teacher_start
from ted_scale.models.quantized import unrounded
from ted_scale.plan import make_plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world, method: str = "ted", **teacher):
    train = {"precision": "bf16"}
    return make_plan(make_run(world, method=method, teacher={"placement": "auto", **teacher}, train=train), 1)


def begun(monkeypatch, caplog, plan, teacher=None) -> tuple[dict, list, str]:
    """(rows of metrics, alerts, the log) of one rank."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    rows, alerts, teacher = {}, [], teacher or engines.bare_teacher(plan, CPU)
    metrics = types.SimpleNamespace(
        write=lambda step, tokens, row: rows.update(row), alert=lambda *said: alerts.append(said)
    )
    stream = open_stream(plan.run.data, plan.run.seed, plan.vocabulary)
    with caplog.at_level("INFO", "ted_scale"):
        teacher_start.begin(plan, stream, teacher, metrics, Progress(0), CPU)
    return rows, alerts, caplog.text


def test_the_cost_of_8_bits_is_logged_and_a_large_one_is_an_alert(world, monkeypatch, caplog):
    pytest.importorskip("torchao")
    plan = plan_of(world, precision="int8")
    rows, alerts, said = begun(monkeypatch, caplog, plan)
    matched = dict.fromkeys(f"teacher/state_error/{t}" for _, t in plan.pairs)
    assert rows.keys() == {"teacher/kl_to_bf16", *matched} and all(0 < value < 0.2 for value in rows.values())
    assert "the teacher in int8 beside bf16, on 1 micro-batches: KL " in said and not alerts
    monkeypatch.setattr(teacher_start, "MOST_ERROR", 1e-6)
    _, ((title, text),), _ = begun(monkeypatch, caplog, plan)
    assert title == "a coarse teacher" and text.startswith("warning: the teacher in int8 beside bf16")


def test_without_matched_states_the_cost_is_kl_alone():
    assert str(teacher_start.Cost(0.0123, {})) == "KL 0.012 nats a token"
    assert str(teacher_start.Cost(0.1, {1: 0.02, 3: 0.3})).endswith(", relative error of matched states 0.02 to 0.3")


def test_the_cost_is_that_of_whole_logits_and_states(world):
    pytest.importorskip("torchao")
    plan = plan_of(world, precision="int8")
    teacher, batch = engines.bare_teacher(plan, CPU), make_batch()
    exact = TeacherBody(unrounded(teacher.body.network, plan.teacher, CPU), plan.teacher, teacher.body.blocks)
    cost = teacher_start.cost_of(teacher, exact, batch, Loss())
    with torch.no_grad():
        ours, theirs = teacher.body(batch, True), exact(batch, True)
        logs = [torch.log_softmax(x.last_NE.float() @ teacher.head.weight.float().T, -1) for x in (ours, theirs)]
    valid = batch.weights_BT.flatten() > 0
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)[valid].mean()
    assert cost.kl == pytest.approx(kl.item(), rel=0.02)
    for (_, block), x, y in zip(plan.pairs, ours.layers_NE, theirs.layers_NE, strict=True):
        assert cost.errors[block] == pytest.approx(((x - y).float().norm() / y.float().norm()).item(), rel=1e-3)


def test_a_plain_teacher_is_not_run_early(world, monkeypatch, caplog):
    plan = plan_of(world, method="kd")
    assert begun(monkeypatch, caplog, plan, types.SimpleNamespace()) == ({}, [], "")


def test_what_compiling_takes_is_logged_and_a_failure_is_a_sentence(world, monkeypatch, caplog):
    compiler, backend = torch.compile, ["eager"]
    monkeypatch.setattr(torch, "compile", lambda forward, **named: compiler(forward, backend=backend[0], **named))
    plan = plan_of(world, method="kd", compile=True)
    rows, _, said = begun(monkeypatch, caplog, plan)
    assert "the teacher's first call took " in said and " s, with compiling its blocks; the second took " in said
    assert not rows

    def fails(graph, inputs):
        raise RuntimeError("no such compiler")

    backend[0] = fails
    torch._dynamo.reset()
    with pytest.raises(
        UserError, match=r"^teacher.compile must be false where torch cannot compile .* no such compiler"
    ):
        begun(monkeypatch, caplog, plan)
