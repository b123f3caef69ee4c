"""ted-scale plan: what fits, what is recommended, what is refused, without weights and data."""

import json
import re

import pytest
import torch
import transformers
from plain import make_world
from tiny import make_run, write_run

from ted_scale.base.errors import UserError
from ted_scale.commands import plan as command
from ted_scale.commands.planning import calibrate, links, options, page, probes, scale
from ted_scale.config.run_file import load_run
from ted_scale.forecast import machine as machines
from ted_scale.models import quantized
from ted_scale.plan import make_plan, plan_of_models

SIZES = {"num_key_value_heads": 8, "vocab_size": 32000}
TEACHER = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32, "num_hidden_layers": 24}
STUDENT = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A teacher of 6.1 B parameters and a student of 0.5 B: two configs, no weights, and a corpus that is not there."""
    root = tmp_path_factory.mktemp("configs")
    for name, sizes in (("teacher", TEACHER), ("student", STUDENT)):
        transformers.LlamaConfig(**SIZES, **sizes).save_pretrained(root / name)
    train = {"tokens_per_step": 1 << 20, "micro_batch": 1, "precision": "bf16"}
    data = {"seq_len": 2048, "corpora": [{"path": str(root / "nowhere")}]}
    run = make_run(root, train=train, data=data, filters={"steps": 0, "width": "auto", "sample_tokens": "auto"},
                   teacher={"placement": "auto"})  # fmt: skip
    return write_run(root / "run.toml", run)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def cluster(gpus: int, per_node: int = 8, **changes) -> options.Cluster:
    return options.Cluster(machines.named("h100", "bf16")._replace(**changes), gpus, per_node)


def said(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        command.main([str(argument) for argument in arguments])
    return ended.value.code, capsys.readouterr().out


def test_a_run_that_fits_exits_with_0_and_has_every_placement(run_file, capsys):
    code, out = said(capsys, run_file, "--gpus", 16, "--gpu", "h100", "--price", 2)
    assert code == 0 and ": fits, " in out
    first = next(line for line in out.splitlines() if "replicated" in line and "sharded" in line)
    assert first.split() == ["replicated", "node", "sharded", "offload"]
    states = ("weights", "filters", "teacher", "masters", "moments", "gradients")
    for term in (*states, "communication", "activations", "states", "gathered"):
        assert f"\n{term}, GiB" in out
    for term in ("teacher", "student", "head", "layer loss", "gathers", "reduction", "optimizer", "data"):
        assert f"\n{term}, ms" in out
    assert "\nMFU " in out and "\ncost " in out and "\nrecommended: --set train.micro_batch=" in out


def test_a_run_that_does_not_fit_exits_with_1(run_file, capsys):
    code, out = said(capsys, run_file, "--gpus", 8, "--gpu", "h100", "--set", "train.micro_batch=64")
    assert code == 1 and "(micro-batch 64, placement sharded, checkpointing off): does not fit, " in out


def ways_on(run_file, on: options.Cluster) -> dict[str, options.Option]:
    run = load_run(run_file)
    return {one.way: one for one in options.placements(options.as_written(options.base(run), run, on).plan, on)}


def test_the_recommendation_fits_and_nothing_that_fits_is_faster(run_file):
    run, on = load_run(run_file), cluster(16)
    best = options.best(options.base(run), run, on)
    others = [one for one in options.every_way(options.base(run), run, on) if one.fits]
    assert best.fits and len(others) > 10
    assert best.days <= 1.001 * min(one.days for one in others)


@pytest.mark.parametrize("asked", ["precision=int8", "compile=true"])
def test_a_teacher_that_must_be_whole_has_one_place_and_a_page_where_it_does_not_fit(run_file, capsys, asked):
    code, out = said(capsys, run_file, "--gpus", 16, "--gpu", "h100", "--set", f"teacher.{asked}")
    assert code == 0 and "\nrecommended: " in out and "--set teacher.placement=replicated" in out
    assert "offload" not in out and ("the teacher's time is that of bf16" in out) == ("int8" in asked)
    code, out = said(
        capsys, run_file, "--gpus", 8, "--gpu", "h100", "--set", f"teacher.{asked}", "--set", "train.micro_batch=64"
    )
    assert code == 1 and "placement replicated, checkpointing off): does not fit" in out


def test_the_page_says_what_a_teacher_of_8_bits_would_need(run_file, capsys):
    """As the same run needs that asks for one. The teacher is in bf16 half as large again, and more."""
    needs = {}
    for precision in ("bf16", "int8"):
        _, out = said(capsys, run_file, "--gpus", 16, "--gpu", "h100", "--set", f"teacher.precision={precision}",
                      "--set", "teacher.placement=replicated")  # fmt: skip
        needs[precision] = out
    line = next(line for line in needs["bf16"].splitlines() if line.startswith("teacher.precision = 'int8' or 'fp8'"))
    of_teacher, whole = re.findall(r"([\d.]+) GiB", line)
    asked = {row.split(",")[0]: row.split()[-1] for row in needs["int8"].splitlines() if ", GiB" in row}
    assert float(of_teacher) == pytest.approx(float(asked["teacher"]), rel=0.01)
    assert float(whole) == pytest.approx(float(asked["in all"]), rel=0.01) and line.endswith(": fits")
    assert "teacher.precision = 'int8' or 'fp8'" not in needs["int8"]


def test_a_run_is_planned_where_torchao_is_not_installed(run_file, monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    run = load_run(run_file, ["teacher.precision=fp8", "teacher.init=random", "student.init=random"])
    assert options.base(run).run.teacher_bits == "fp8"
    with pytest.raises(UserError, match=r"^teacher.precision must be left out where torchao is not installed"):
        make_plan(run, 1)


def test_the_host_s_memory_is_taken_only_if_the_run_file_says_so(run_file):
    """With a slow network the copy from the host is the fastest, and where the other places do not fit the only way."""
    asked, on = load_run(run_file, ["teacher.placement=offload"]), cluster(16, far_link=1e8, node_link=1e8, memory=24e9)
    assert options.best(options.base(asked), asked, on).way == "offload"
    run = load_run(run_file)
    assert getattr(options.best(options.base(run), run, on), "way", None) != "offload"


def test_on_a_slow_network_the_student_is_to_be_sent_once_a_step(run_file):
    """Where it fits whole, and the ds_config is not the user's own."""
    run = load_run(run_file, ["train.tokens_per_step=16777216", "ds_config=ds_configs/zero3.json"])
    found = {}
    for name, link in (("slow", 1e8), ("fast", 1e15)):
        on = cluster(16, far_link=link, node_link=link)
        best = options.best(options.base(run), run, on)
        found[name] = page.recommendation(best, run)
        assert best.days <= min(one.days for one in options.every_way(options.base(run), run, on) if one.fits)
    assert f"--set ds_config={options.WHOLE_STUDENT} --set train.reduce_once=true" in found["slow"]
    assert "ds_config" not in found["fast"] and "reduce_once" not in found["fast"]


def test_where_nothing_fits_nothing_is_recommended(run_file):
    run = load_run(run_file)
    assert options.best(options.base(run), run, cluster(8, memory=1e9)) is None
    assert page.recommendation(None, run).startswith("recommended: nothing fits; ")


def test_placements_that_are_another_one_on_these_ranks_are_left_out(run_file):
    ways = {gpus: [*ways_on(run_file, cluster(gpus))] for gpus in (1, 8, 16)}
    assert ways == {
        1: ["replicated", "offload"], 8: ["replicated", "sharded", "offload"],
        16: ["replicated", "node", "sharded", "offload"],
    }  # fmt: skip


def test_a_slow_network_makes_the_whole_teacher_on_every_rank_pay(run_file):
    """With 8 GB/s a node, 12 GB of teacher a micro-step take more than a second; inside a node they do not matter."""
    slow, fast = cluster(64, far_link=1e9), cluster(64, far_link=1e13, node_link=1e13, latency=0.0)
    found, quick = ({way: one.days for way, one in ways_on(run_file, on).items()} for on in (slow, fast))
    assert found["replicated"] <= found["node"] < 0.7 * found["sharded"]
    assert quick["sharded"] == pytest.approx(quick["replicated"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--gpus 12 --gpu h100", r"--per-node must divide --gpus \(12\), but is 8; every node must have as many ranks"),
        ("--gpus 3 --gpu h100", r"train.tokens_per_step must be a multiple of micro_batch \* seq_len \* ranks"),
        (
            "--gpus 16 --gpu h100 --set teacher.node_ranks=3",
            r"teacher.node_ranks must divide the ranks \(16\), but is 3",
        ),
        (
            "--gpus 8",
            r"--gpu must be set where no machine was calibrated, but is not, and .*machine.json does not exist",
        ),
    ],
)
def test_what_cannot_be_is_a_sentence(run_file, arguments, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        command.main([str(run_file), *arguments.split()])


def test_a_calibration_by_one_rank_plans_one(run_file, tmp_path):
    machines.write(tmp_path / "machine.json", machines.named("h100", "bf16")._replace(ranks=1))
    for ranks in (["--gpus", "16"], ["--scale"]):
        with pytest.raises(UserError, match=r"^--gpus must be 1 with a calibration by one rank"):
            command.main([str(run_file), *ranks, "--machine", str(tmp_path / "machine.json")])


def test_a_run_file_that_is_missing_is_called_as_in_the_usage():
    with pytest.raises(UserError, match=r"^RUN.toml must name a readable run file, but nowhere.toml is not"):
        command.main(["nowhere.toml", "--gpu", "h100"])


def test_a_calibration_is_used_where_no_gpu_is_named(run_file, tmp_path, capsys):
    machines.write(tmp_path / "machine.json", machines.named("h100", "bf16")._replace(name="ours", source="calibrated"))
    code, out = said(capsys, run_file, "--gpus", 16, "--machine", tmp_path / "machine.json", "--bandwidth", 80)
    assert code == 0 and "16 x ours (calibrated), 8 a node, 80 GB/s a node to the others" in out


def test_over_many_gpus_the_table_says_who_fits_and_what_failures_cost(run_file, monkeypatch):
    monkeypatch.setattr(scale, "GPUS", (8, 64, 4096))
    arguments = command.parse([str(run_file), "--price", "2"])
    lines = scale.table(load_run(run_file), machines.named("h100", "bf16"), arguments).splitlines()
    few, more, most = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert (few[0], more[0], most[0]) == ("8", "64", "4,096")
    assert few[2] == "-" and more[2] != "-"  # eight are one node
    assert "a step has 512 rows" in most
    assert few[5] in ("sharded", "replicated", "node")  # nobody knows what the host has to spare
    assert float(few[9].rstrip("%")) >= float(more[9].rstrip("%")) > 99
    hours = [float(cells[7].rstrip(" h").replace(",", "")) for cells in (few, more)]
    assert hours[0] == pytest.approx(8 * hours[1], rel=1e-3)


def test_rates_are_those_of_the_probes(run_file):
    """Twice the time of every probe is half of every rate."""
    plan = options.base(load_run(run_file))
    names = [f"{side} {kind}" for side in ("teacher", "student") for kind in ("blocks", "products", "attention")]
    took = dict.fromkeys([*names, "student blocks, both ways", "head", "layer loss", "update", "calls"], 1.0)
    took |= {"teacher blocks": 3.0, "student blocks": 3.0, "student blocks, both ways": 9.0}
    once, twice = (calibrate.rates(plan, {name: times * value for name, value in took.items()}) for times in (1, 2))
    assert once.keys() == {"products", "attention", "head", "layer", "copies", "update", "call"}
    assert all(twice[name] == pytest.approx(value / 2) for name, value in once.items() if name != "call")
    assert json.dumps(once)


def test_a_link_is_what_blocks_take_one_after_the_other(run_file):
    """A second for all that a rank receives of five blocks of the teacher in bf16 and four of the student in fp32."""
    plan = options.base(load_run(run_file))
    took = {"gathers": 0.4, "reductions": 0.6, "latency": 0.0}
    received = 5 * 2 * plan.teacher.block_parameters + 4 * 4 * plan.student.block_parameters
    assert links.rate(plan, 8, took, "cuda") == pytest.approx(7 / 8 * received, rel=1e-6)
    slow = {"gathers": 0.8, "reductions": 1.2, "latency": 0.0}
    assert links.rate(plan, 8, slow, "cuda") == pytest.approx(links.rate(plan, 8, took, "cuda") / 2)
    assert links.rate(plan, 8, {**took, "latency": 0.01}, "cuda") > links.rate(plan, 8, took, "cuda")


@pytest.mark.parametrize(("beside", "share"), [(3.0, 1.0), (4.0, 0.0), (3.25, 0.75), (2.0, 1.0), (9.0, 0.0)])
def test_the_overlap_is_what_of_the_shorter_one_is_not_seen(run_file, beside, share):
    plan = options.base(load_run(run_file))
    for sent, ran in ((3.0, 1.0), (1.0, 3.0)):
        took = {"gathers": sent, "teacher blocks": ran, "gathers beside blocks": beside}
        assert links.overlap(plan, took) == pytest.approx(share)


def test_beside_blocks_as_much_is_gathered_as_alone(world, monkeypatch):
    """Before every block but the first it has waited for the one that was asked for before."""
    plan, said = plan_of_models(make_run(world, method="kd", filters={"steps": 0}), 1, needs_weights=False), []

    class Asked:
        def wait(self):
            said.append("here")

    monkeypatch.setattr(links.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(links.dist, "all_gather_into_tensor", lambda *_, **__: said.append("asked") or Asked())
    blocks = probes.probes(plan, torch.device("cpu"))["teacher blocks"]
    found = links.probes(plan, torch.device("cpu"), lambda before: blocks(lambda: (before(), said.append("block"))))
    found["gathers"]()
    assert said == ["asked", "here"] * links.gathers(plan)
    said.clear()
    found["gathers beside blocks"]()
    assert said == ["asked", *["here", "asked", "block"] * (links.gathers(plan) - 1), "here"]


def test_ranks_that_share_rows_count_as_one_where_micro_batches_are_tried(run_file):
    """Eight rows a step for 64 ranks, eight to a row."""
    run = load_run(run_file, ["train.tokens_per_step=16384", "data.sequence_parallel=8"])
    assert options.micro_batches(run, 64) == [1]
    assert options.micro_batches(run, 8) == [1, 2, 4, 8]


def test_a_machine_is_calibrated_for_a_run_whose_step_has_less_rows_than_ranks(run_file):
    run = load_run(run_file, ["train.tokens_per_step=2048", "data.sequence_parallel=2"])
    whole = calibrate.with_whole_rows(run, 2)
    assert whole.data.sequence_parallel == 1 and whole.train.tokens_per_step == 2 * 2048
