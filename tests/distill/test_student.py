"""The student module of both stages against transformers' own models and against losses written out here."""

import pytest
import torch
import transformers
from plain import build, cut, make_batch, make_shard, make_world, own_model, run_step
from tiny import make_model, make_run

from ted_scale.distill.normalization import count_valid
from ted_scale.distill.signal import Weights
from ted_scale.engines import build_filters
from ted_scale.kernels.tokens import IGNORED
from ted_scale.models import attention
from ted_scale.models.anatomy import StateRecorder
from ted_scale.plan import make_plan

ON = Weights(ce=0.5, kl=2.0, layer=3.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def same_width(tmp_path_factory):
    root = tmp_path_factory.mktemp("same_width")
    make_model(root / "teacher", "llama")
    make_model(root / "student", "gpt2", num_hidden_layers=2, seed=1)
    make_shard(root / "corpus")
    return root


class Own:
    """A model as transformers runs it: its blocks' outputs, its logits, and its norm and head for any state."""

    def __init__(self, folder, batch, blocks: str, norm: str):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.model, self.states = model, []
        self.norm = model.get_submodule(norm)
        for block in model.get_submodule(blocks):
            block.register_forward_hook(lambda m, i, o: self.states.append(o[0] if isinstance(o, tuple) else o))
        self.logits = model(batch.tokens_BT).logits

    def read(self, states):
        return self.model.get_output_embeddings()(self.norm(states))


def own_teacher(root, batch) -> Own:
    return Own(root / "teacher", batch, "model.layers", "model.norm")


def own_student(root, batch) -> Own:
    return Own(root / "student", batch, "transformer.h", "transformer.ln_f")


def ce_of(logits, batch):
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (batch.labels_BT != IGNORED).sum()


def over_valid(values_BT, batch):
    valid = batch.labels_BT != IGNORED
    return values_BT[valid].sum() / valid.sum()


def nmse(s, t, batch):
    return over_valid((s - t).square().sum(-1) / t.square().sum(-1), batch)


def filter_of(filter, states):
    return torch.nn.functional.linear(states, filter.weight, filter.bias)


STAGES = {
    "ce": {"method": "ce"},
    "kd": {"method": "kd"},
    "lwd": {"method": "lwd"},
    "ted": {"method": "ted"},
    "ted, stage I": {"method": "ted", "stage": "filters"},
    "ted, stage I, per layer": {"method": "ted", "stage": "filters", "filters": {"head": "per_layer", "mlp": 8}},
}


@pytest.mark.parametrize("sections", STAGES.values(), ids=STAGES)
def test_accumulation_changes_neither_losses_nor_gradients(world, sections):
    parts, batch = build(world, **sections), make_batch(documents=True)
    valid = [(b.labels_BT != IGNORED).sum().item() for b in cut(batch)]
    assert len(set(valid)) == 4 and 0 in valid  # uneven, and a micro-batch without any
    whole, gradients = run_step(parts, [batch])
    pieces, piece_gradients = run_step(parts, cut(batch))
    for term in ("total", "ce", "kl", "layer", "layers"):
        together = sum(getattr(p, term) for p in pieces)
        assert torch.allclose(together, getattr(whole[0], term), atol=1e-6), term
    assert gradients.keys() == piece_gradients.keys() and gradients
    worst = max((gradients[n] - piece_gradients[n]).abs().max().item() for n in gradients)
    assert worst < 1e-6
    assert max(g.abs().max().item() for g in gradients.values()) > 1e-3


def test_stage_two_is_the_weighted_sum_of_its_three_terms_and_each_is_the_naive_one(world):
    parts, batch = build(world, loss={"temperature": 2.0}), make_batch()
    losses, _ = run_step(parts, [batch], ON)
    student, teacher = own_student(world, batch), own_teacher(world, batch)
    p, q = (z.div(2).softmax(-1) for z in (teacher.logits, student.logits))
    kl = 4 * over_valid((p * (p / q).log()).sum(-1), batch)
    filters_s, filters_t = parts.student.filters_s, parts.student.filters_t
    layers = [
        nmse(filter_of(filters_s[k], student.states[s]), filter_of(filters_t[k], teacher.states[t]), batch)
        for k, (s, t) in enumerate([(0, 1), (1, 3)])
    ]
    assert parts.plan.pairs == [(0, 1), (1, 3)]
    assert losses[0].ce.item() == pytest.approx(ce_of(student.logits, batch).item(), rel=1e-5)
    assert losses[0].kl.item() == pytest.approx(kl.item(), rel=1e-5)
    assert losses[0].layers.tolist() == pytest.approx([v.item() for v in layers], rel=1e-5)
    assert losses[0].layer.item() == pytest.approx(sum(v.item() for v in layers) / 2, rel=1e-5)
    expected = 0.5 * losses[0].ce + 2 * losses[0].kl + 3 * losses[0].layer
    assert losses[0].total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("width", ["full", 20])
def test_stage_two_trains_the_network_and_the_student_s_filters_only(world, width):
    parts = build(world, filters={"width": width})
    assert not any(
        "lift" in n for side in (parts.student.filters_s, parts.student.filters_t) for n, _ in side.named_parameters()
    )
    _, gradients = run_step(parts, [make_batch()], ON)
    assert all(gradients[n].abs().max() > 0 for n in gradients if n.startswith("filters_s"))
    assert "network.transformer.h.0.attn.c_attn.weight" in gradients
    assert not any(n.startswith("filters_t") for n in gradients)
    frozen = [*parts.student.filters_t.parameters(), *parts.teacher.engine.parameters()]
    assert frozen and all(not p.requires_grad and p.grad is None for p in frozen)


def test_the_gather_of_the_teacher_s_head_starts_before_its_last_block(world, monkeypatch):
    """If it started later, the student would have to wait for it."""
    parts, seen = build(world), []
    body = parts.teacher.body
    monkeypatch.setattr("ted_scale.distill.teacher.start_gather", lambda parameters, **_: seen.append(list(parameters)))
    body.network.get_submodule(body.anatomy.blocks)[-1].register_forward_hook(lambda *_: seen.append("last block"))
    parts.teacher(make_batch(), ON)
    parts.teacher(make_batch(), ON._replace(kl=0.0))
    assert seen == [parts.teacher.head.projection, "last block", [], "last block"]


def test_the_gradient_of_ce_alone_is_the_family_s_own(world):
    parts, batch = build(world, method="ce"), make_batch()
    _, gradients = run_step(parts, [batch])
    own = own_student(world, batch)
    ce_of(own.logits, batch).backward()
    for name, parameter in own.model.named_parameters():
        assert torch.allclose(gradients[f"network.{name}"], parameter.grad, atol=1e-6), name


def test_ce_needs_no_teacher_and_ignores_one_that_is_given(world):
    parts = build(world, method="ce", teacher={"path": "/nowhere"})
    assert parts.plan.teacher is None and parts.teacher is None and parts.student.filters_s is None
    losses, gradients = run_step(parts, [make_batch()])
    assert losses[0].kl == losses[0].layer == 0
    assert losses[0].total == losses[0].ce
    assert gradients


def test_without_layer_weight_nothing_is_captured_and_filters_get_no_gradient(world, monkeypatch):
    wanted, record = [], StateRecorder.record
    monkeypatch.setattr(StateRecorder, "record", lambda self, w: (wanted.append(w), record(self, w))[1])
    parts, batch = build(world), make_batch()
    off = ON._replace(layer=0.0)
    assert parts.teacher(batch, off).layers_NE == ()
    losses, gradients = run_step(parts, [batch], off)
    assert wanted and not any(wanted)
    assert losses[0].layers.tolist() == [0.0, 0.0]
    assert not any(n.startswith("filters_") for n in gradients)
    kd_losses, kd_gradients = run_step(build(world, method="kd"), [batch], off)
    assert losses[0].total == kd_losses[0].total
    assert all(torch.equal(gradients[n], g) for n, g in kd_gradients.items())


def test_a_teacher_that_no_term_needs_does_not_run(world):
    parts = build(world)
    parts.teacher.engine.forward = None
    assert parts.teacher(make_batch(), Weights(1.0, 0.0, 0.0)) is None


def test_a_run_on_hidden_states_alone_trains(world):
    parts, batch = build(world), make_batch()
    losses, gradients = run_step(parts, [batch], Weights(ce=0.0, kl=0.0, layer=1.0))
    assert losses[0].ce == losses[0].kl == 0
    assert losses[0].total == losses[0].layer > 0
    assert gradients["network.transformer.h.0.attn.c_attn.weight"].abs().max() > 0


def test_lwd_compares_with_the_teacher_s_raw_states(world):
    parts, batch = build(world, method="lwd"), make_batch()
    assert parts.student.filters_t is None and len(parts.plan.stages) == 1
    losses, gradients = run_step(parts, [batch], ON)
    student, teacher = own_student(world, batch), own_teacher(world, batch)
    expected = [
        nmse(filter_of(parts.student.filters_s[k], student.states[s]), teacher.states[t], batch).item()
        for k, (s, t) in enumerate(parts.plan.pairs)
    ]
    assert losses[0].layers.tolist() == pytest.approx(expected, rel=1e-5)
    assert all(gradients[f"filters_s.{k}.weight"].abs().max() > 0 for k in (0, 1))


def stage_one_by_hand(parts, root, batch):
    """Every filter's next-token loss, the teacher's filters first."""
    student, teacher = own_student(root, batch), own_teacher(root, batch)
    reader = student if parts.plan.run.filters.head == "own" else teacher
    sides = []
    for model, filters, read, which in (
        (teacher, parts.student.filters_t, teacher, 1),
        (student, parts.student.filters_s, reader, 0),
    ):
        for k, pair in enumerate(parts.plan.pairs):
            filtered = filter_of(filters[k], model.states[pair[which]].detach())
            lift = parts.student.filters_t[k].lift_weight
            filtered = filtered if lift is None else filtered @ lift.T
            if parts.plan.run.filters.head == "per_layer":
                logits = torch.nn.functional.linear(filtered, filters[k].head_weight, filters[k].head_bias)
            else:
                logits = read.read(filtered)
            sides.append(ce_of(logits, batch))
    return sides


@pytest.mark.parametrize("width", ["full", 20])
@pytest.mark.parametrize("head", ["shared", "own", "per_layer"])
def test_stage_one_is_every_filter_s_own_next_token_loss(world, same_width, head, width):
    root, batch = same_width if head == "own" else world, make_batch()
    parts = build(root, "filters", filters={"head": head, "width": width})
    assert any("lift" in n for n, _ in parts.student.named_parameters()) == (head != "per_layer" and width == 20)
    losses, gradients = run_step(parts, [batch])
    expected = stage_one_by_hand(parts, root, batch)
    assert losses[0].layers.tolist() == pytest.approx([v.item() for v in expected], rel=1e-5)
    assert losses[0].total.item() == pytest.approx(sum(v.item() for v in expected) / 2, rel=1e-5)
    parts.student.zero_grad()
    (sum(expected) / 2).backward()
    mine = {n: p.grad for n, p in parts.student.named_parameters() if n.startswith("filters_")}
    assert gradients.keys() == mine.keys()  # only filters, and all of them
    assert max((gradients[n] - mine[n]).abs().max().item() for n in mine) < 1e-6
    assert any("head_weight" in n for n in mine) == (head == "per_layer")


def test_stage_one_needs_no_graph_through_the_body(world):
    parts = build(world, "filters")
    with StateRecorder(parts.student.network, parts.plan.student, [0]).record(True) as states:
        parts.student.run_network(make_batch(), True)
        assert not states[0].requires_grad


def identity(filters) -> None:
    for filter in filters:
        filter.load_state_dict({"weight": torch.eye(len(filter.weight)), "bias": torch.zeros(len(filter.bias))})


def test_identity_filters_on_the_last_block_read_both_models_own_ce(same_width):
    parts, batch = build(same_width, "filters", filters={"head": "own"}), make_batch()
    identity(parts.student.filters_s)
    identity(parts.student.filters_t)
    losses, _ = run_step(parts, [batch])
    teacher_first, teacher_last, student_first, student_last = losses[0].layers.tolist()
    ce_t = parts.teacher.ce(batch, count_valid([batch])).item()
    ce_s = ce_of(own_student(same_width, batch).logits, batch).item()
    assert ce_t == pytest.approx(ce_of(own_teacher(same_width, batch).logits, batch).item(), rel=1e-5)
    assert teacher_last == pytest.approx(ce_t, rel=1e-5)
    assert student_last == pytest.approx(ce_s, rel=1e-5)
    assert abs(teacher_first - ce_t) > 1e-3 and abs(student_first - ce_s) > 1e-3


def test_validation_is_the_student_s_ce_without_a_signal_and_without_a_graph(world):
    for sections in ({"method": "kd"}, {"method": "ted"}):
        parts, batch = build(world, **sections), make_batch()
        with torch.no_grad():
            losses = parts.student(batch, None, Weights(1.0, 0.0, 0.0), count_valid([batch]))
        assert not losses.total.requires_grad
        assert losses.ce.item() == pytest.approx(ce_of(own_student(world, batch).logits, batch).item(), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "cohere2"])
def test_logits_are_the_family_s_own_to_the_last_bit(tmp_path, family):
    """Tied or not, soft-capped, scaled: lm-eval's scores follow from them."""
    make_model(tmp_path / "student", family)
    make_shard(tmp_path / "corpus")
    parts, batch = build(tmp_path, method="ce"), make_batch()
    with torch.no_grad():
        ours = parts.student(batch, None, None, None)
        theirs = own_model(tmp_path / "student", attn_implementation=attention.NAME)(batch.tokens_BT).logits
        one = parts.student(batch, None, None, None, at=3)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(one, theirs[:, 3])


@pytest.mark.parametrize("stage", ["filters", "student"])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(world, stage):
    batch = make_batch(documents=True)
    plain, checkpointed = build(world, stage), build(world, stage)
    checkpointed.student.network.gradient_checkpointing_enable({"use_reentrant": False})
    (losses,), gradients = run_step(plain, [batch])
    (again,), again_gradients = run_step(checkpointed, [batch])
    assert torch.equal(losses.total, again.total) and torch.equal(losses.layers, again.layers)
    assert gradients.keys() == again_gradients.keys()
    assert max((gradients[n] - again_gradients[n]).abs().max().item() for n in gradients) < 1e-6


def test_documents_reach_both_models(world):
    parts = build(world)
    apart, _ = run_step(parts, [make_batch(documents=True)], ON)
    together, _ = run_step(parts, [make_batch()], ON)
    assert abs(apart[0].ce - together[0].ce) > 1e-3
    signals = [parts.teacher(make_batch(documents=d), ON) for d in (True, False)]
    assert (signals[0].last_NE - signals[1].last_NE).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["lwd", "ted"])
def test_filters_between_equal_widths_begin_as_the_identity_unless_noise_is_asked_for(same_width, method):
    for start, is_identity in (("states", True), ("random", True), ("noise", False)):
        plan = make_plan(make_run(same_width, method=method, filters={"start": start}), 1)
        sides = [side for side in build_filters(plan, plan.stages[-1]) if side is not None]
        weights = [filter.weight for side in sides for filter in side]
        assert len(weights) == 2 * (1 + (method == "ted"))
        assert all(torch.equal(weight, torch.eye(32)) is is_identity for weight in weights)
