"""Where the teacher lives: what `auto` takes, on how much memory, how ranks agree, and what is refused before they meet."""

import json

import pytest
import transformers
from plain import make_world
from tiny import make_run, write_run

from ted_scale.base.errors import UserError
from ted_scale.config.run_file import load_run
from ted_scale.forecast import placement
from ted_scale.plan import describe, make_plan
from ted_scale.ranks import capacity

DEEP = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With a teacher of 16 blocks and no weights, which shards make smaller; a tiny one is gathered whole."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    transformers.LlamaConfig(**DEEP, bos_token_id=1, eos_token_id=2).save_pretrained(folder / "deep")
    return folder


def plan_of(world, ranks: int = 4, *, placement="auto", node_ranks=2, **sections):
    teacher = {"path": str(world / "deep"), "init": "random", "placement": placement, "node_ranks": node_ranks}
    return make_plan(make_run(world, method="kd", teacher=teacher, **sections), ranks)


def of_size(monkeypatch, size: float, device: str = "cuda") -> None:
    monkeypatch.setattr(capacity, "of_a_rank", lambda ranks: (device, size))


@pytest.mark.parametrize("way", placement.BY_ITSELF)
def test_auto_takes_the_fastest_that_fits_and_says_so(world, monkeypatch, way):
    size = placement.needed(plan_of(world, placement=way), "cuda")
    of_size(monkeypatch, size * 1.001 / placement.ROOM["cuda"])
    plan = plan_of(world)
    assert plan.placement[:3] == plan_of(world, placement=way).placement[:3]
    assert "(auto: the fastest that fits; GiB needed of 90% of " in describe(plan)
    assert f"{way} {size / 2**30:,.3g})" in describe(plan)


def test_where_nothing_fits_auto_takes_what_needs_least(world, monkeypatch):
    of_size(monkeypatch, 1000.0)
    assert plan_of(world).placement.way == "sharded"  # offload takes the host's memory, so it is only taken by name
    assert "auto: none fits, this one needs least" in describe(plan_of(world))


def test_of_a_single_node_and_of_a_single_rank_fewer_places_are_left(world, monkeypatch):
    ways = [[p.way for p in placement.candidates(plan_of(world, n, node_ranks=m), m)] for n, m in ((4, 4), (1, 1))]
    assert ways == [["replicated", "sharded"], ["replicated"]]


def test_a_rank_that_shares_with_no_other_has_no_engine(world, tmp_path):
    bare = {way: plan_of(world, 1, placement=way, node_ranks=1).placement.is_bare for way in placement.FASTEST_FIRST}
    assert bare == dict.fromkeys(placement.FASTEST_FIRST, True)
    assert "are whole on every rank" in str(plan_of(world, 1, placement="sharded", node_ranks=1).placement)
    assert not plan_of(world, placement="sharded").placement.is_bare
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    )
    offloaded = plan_of(world, 1, placement="sharded", node_ranks=1, ds_config=str(tmp_path / "ds.json"))
    assert not offloaded.placement.is_bare  # DeepSpeed brings its shards to the device


def test_the_ranks_of_a_node_are_those_that_the_launcher_started(world, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "2")
        assert plan_of(world, 8, placement="node", node_ranks=None, train={"tokens_per_step": 256}).placement.ranks == 2
        monkeypatch.delenv(name)
    assert plan_of(world, 8, placement="node", node_ranks=4).placement.ranks == 4


@pytest.mark.parametrize(
    ("node_ranks", "started", "sentence"),
    [
        (3, None, "teacher.node_ranks must divide the ranks (4), but is 3; correct it, or leave it out for what the launcher "
         "started on this node"),
        (None, "3", "teacher.node_ranks must be set where nodes have different numbers of ranks, but this one has 3 of 4; set "
         "it to a number that divides both, or take teacher.placement = 'sharded'"),
    ],
)  # fmt: skip
def test_a_node_that_does_not_divide_the_ranks_is_refused(world, monkeypatch, node_ranks, started, sentence):
    if started:
        monkeypatch.setenv("LOCAL_SIZE", started)
    with pytest.raises(UserError) as caught:
        plan_of(world, placement="node", node_ranks=node_ranks)
    assert str(caught.value) == sentence


def test_a_mistake_in_a_ds_config_is_a_sentence_where_memory_is_estimated_with_it(world, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_com": True}}))
    with pytest.raises(UserError, match=r"ds.json: zero_optimization.overlap_com must be what DeepSpeed knows"):
        plan_of(world, ds_config=str(tmp_path / "ds.json"))


def test_a_place_without_a_teacher_is_refused(world, tmp_path):
    file = write_run(tmp_path / "run.toml", make_run(world, method="ce").model_copy(update={"teacher": None}))
    with pytest.raises(UserError, match=r"^--set teacher.placement: teacher.path must be set, but is missing$"):
        load_run(file, ["teacher.placement=node"])


def test_a_run_of_ce_ignores_where_its_teacher_would_live(world):
    """As every other key of a teacher that its method does not ask: arms of a comparison share a run file."""
    plan = make_plan(make_run(world, method="ce", teacher={"placement": "replicated"}), 1)
    assert plan.placement is None and "teacher" not in describe(plan)


def test_ranks_agree_on_the_most_careful_choice(world, monkeypatch):
    whole, node, other = (plan_of(world, placement=w, node_ranks=n).placement for w, n in
                          (("replicated", 2), ("node", 2), ("node", 1)))  # fmt: skip
    for everyone, chosen in (([whole, node], node), ([whole, whole], whole), ([None, None], None)):
        monkeypatch.setattr(placement, "gather", lambda mine, everyone=everyone: everyone)
        assert placement.agreed(everyone[0]) == chosen
    monkeypatch.setattr(placement, "gather", lambda mine: [node, other])
    with pytest.raises(UserError, match=r"^teacher.node_ranks must be set where nodes have different numbers of ranks"):
        placement.agreed(node)


WRITTEN = {True: "true", "int8": "'int8'"}
WHOLE = [{"compile": True}, {"precision": "int8"}]


def whole_plan(world, whole: dict):
    if "precision" in whole:
        pytest.importorskip("torchao")
    teacher = {"path": str(world / "deep"), "init": "random", "placement": "auto", **whole}
    return make_plan(make_run(world, method="kd", teacher=teacher, train={"precision": "bf16"}), 4)


@pytest.mark.parametrize("whole", WHOLE, ids=str)
def test_a_teacher_that_must_be_whole_is_or_is_refused(world, monkeypatch, whole):
    """`auto` has no other place for it, nor has a run that is out of memory."""
    plan = whole_plan(world, whole)
    assert plan.placement[:3] == ("replicated", 1, True) and placement.needs_less(plan, True) is None
    of_size(monkeypatch, 2.0**20)
    with pytest.raises(UserError) as caught:
        whole_plan(world, whole)
    key, value = next(iter(whole.items()))
    needs = placement.needed(plan, "cuda") / 2**30
    assert str(caught.value) == (
        f"teacher.placement must be one that fits, but with teacher.{key} = {WRITTEN[value]} only "
        f"'replicated' is possible, which needs {needs:,.3g} GiB of 90% of 0.000977 on cuda; leave teacher.precision and "
        "teacher.compile out, or overrule the estimate by teacher.placement = 'replicated'"
    )
    assert whole_plan(world, {**whole, "placement": "replicated"}).placement.is_bare


def test_in_8_bits_a_teacher_fits_where_in_bf16_it_does_not(world, monkeypatch):
    pytest.importorskip("torchao")
    plain, small = (placement.needed(whole_plan(world, w), "cuda") for w in ({"compile": True}, {"precision": "int8"}))
    of_size(monkeypatch, (plain + small) / 2 / placement.ROOM["cuda"])
    assert whole_plan(world, {"precision": "int8"}).placement.way == "replicated"
    with pytest.raises(UserError, match="only 'replicated' is possible"):
        whole_plan(world, {"compile": True})


@pytest.mark.parametrize(
    ("way", "ranks", "on_cpu", "less"),
    [("replicated", 4, False, "sharded"), ("node", 4, True, "sharded"), ("sharded", 4, False, "offload"),
     ("sharded", 4, True, None), ("replicated", 1, False, "offload"), ("offload", 4, False, None)],
)  # fmt: skip
def test_a_run_that_is_out_of_memory_is_told_a_place_that_needs_less(world, way, ranks, on_cpu, less):
    plan = plan_of(world, ranks, placement=way, node_ranks=1 if ranks == 1 else 2)
    assert placement.needs_less(plan, on_cpu) == less


def test_a_host_has_what_its_control_group_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "GROUPS", tmp_path)
    monkeypatch.setattr(capacity, "PROCESS", tmp_path / "of_this_process")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    (tmp_path / "of_this_process").write_text("1:cpuset:/\n0::/job/step\n")
    whole = capacity.of_the_host()
    (tmp_path / "job" / "memory.max").write_text("1000000\n")
    assert capacity.of_the_host() == 1000000 < whole
    assert capacity.of_a_rank(4) == ("cpu", 250000)
    (tmp_path / "memory" / "old").mkdir(parents=True)
    (tmp_path / "memory" / "old" / "memory.limit_in_bytes").write_text("2000\n")
    (tmp_path / "of_this_process").write_text("4:memory,hugetlb:/old\n")
    assert capacity.of_the_host() == 2000
