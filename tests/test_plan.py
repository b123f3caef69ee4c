"""The dry run: what it prints, that it starts and writes nothing, and that every mistake it can find is one sentence."""

import json
import logging
import shutil
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
from plain import make_shard, make_world
from tiny import make_model, make_run, pretrain, pretrain_command, write_run
from transformers import FalconH1Config, Lfm2Config, PreTrainedTokenizerFast, StableLmConfig

from ted_scale import engines
from ted_scale import run as run_module
from ted_scale.base.errors import UserError
from ted_scale.base.sealed import seal
from ted_scale.checkpoints.progress import Progress, progress_as_bytes
from ted_scale.commands import pretrain as pretrain_module
from ted_scale.config.run_file import load_run
from ted_scale.corpora.tokenizer import digest, load_tokenizer
from ted_scale.distill import memory
from ted_scale.distill.filter_sizes import filter_parameters
from ted_scale.distill.pairs import cut_map
from ted_scale.engines import build_filters, check_engine_config
from ted_scale.feed import Reading
from ted_scale.forecast.summary import uncounted
from ted_scale.metrics import console, live_report
from ted_scale.plan import describe, make_plan, plan_of_models, stage_flops
from ted_scale.run import train_run
from ted_scale.storage import hub


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(original, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(original, tmp_path / "world")


def tree(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*")}


def refusal(root: Path, ranks: int = 1, **sections) -> str:
    """The sentence with which make_plan refuses a run. It must have written nothing."""
    run, before = make_run(root, **sections), tree(root)
    with pytest.raises(UserError) as caught:
        make_plan(run, ranks)
    assert tree(root) == before
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(str(root), "ROOT")


def test_a_dry_run_prints_the_resolved_run_and_its_arithmetic_and_starts_nothing(world):
    run = make_run(world)
    file = write_run(world / "run.toml", run)
    before = tree(world)
    command = pretrain_command("--config", file, "--dry-run", "--ranks", 2, "--set", "train.lr=0.25")
    # Anew, because what it imports must print nothing either.
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text, _, arithmetic = done.stdout.partition("\n\nrun tiny: ")
    uniform = "uniform, because student.path has no cut.json"
    assert f"pairs (student block, teacher block), {uniform}: (0,1) (1,3)\n" in arithmetic
    assert "step: 256 tokens = 4 accumulation * 1 micro-batch * 2 ranks * 32 tokens\n" in arithmetic
    assert "memory a rank in stage filters, estimated for c" in arithmetic
    assert "stage filters: 4 steps, 1,024 tokens" in arithmetic and "stage student: 6 steps" in arithmetic
    assert tree(world) == before
    (world / "printed.toml").write_text(text)
    assert load_run(world / "printed.toml") == load_run(file, ["train.lr=0.25"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("loss.kll=1", "error: --set loss.kll: unknown key loss.kll; did you mean loss.kl?\n"),
        ("pairs.explicit=[[2, 0]]", "error: pairs.explicit[0] must name student blocks 0 to 1, but is [2, 0]\n"),
        (
            "ds_config=typing.json",
            "error: ds_config typing.json: zero_optimization.overlap_com must be what DeepSpeed knows, but is true (Extra "
            "inputs are not permitted); correct it\n",
        ),
    ],
    ids=["before torch", "after the models are read", "what only DeepSpeed knows"],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(world, override, sentence):
    """The dry run once did not check the ds_config."""
    file = write_run(world / "run.toml", make_run(world))
    (world / "typing.json").write_text('{"zero_optimization": {"stage": 3, "overlap_com": true}}')
    before = tree(world)
    done = pretrain("--config", file, "--dry-run", "--set", override, cwd=world)
    assert (done.returncode, done.stdout, done.stderr.replace(str(world), "ROOT")) == (2, "", sentence)
    assert tree(world) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--ranks", 2),
            "error: --ranks must come with --dry-run, but is 2 without it; the launcher decides how many start\n",
        ),
        (
            ("--dry-run", "--ranks", 0),
            "error: --ranks must be at least 1, but is 0; leave it out to use the launcher's number\n",
        ),
    ],
    ids=["a real run", "none"],
)
def test_impossible_numbers_of_ranks_are_refused(world, arguments, sentence):
    before = tree(world)
    done = pretrain("--config", world / "run.toml", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)
    assert tree(world) == before


def test_a_plan_for_other_ranks_than_there_are_is_refused(world, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with pytest.raises(UserError, match=r"^the plan must be made for the ranks there are \(1\), but is made for 2; "):
        train_run(make_plan(make_run(world), 2), torch.device("cpu"))


def test_the_plan_s_numbers_are_those_of_the_models_and_the_corpus(original):
    plan = make_plan(make_run(original, filters={"mlp": 8}), 2)
    assert (plan.accumulation, plan.stages[0].samples_per_step, plan.total_steps) == (4, 8, 10)
    tokens = sum(40 + d for d in range(18))
    seen = {"filters": 4 * 256 / tokens, "student": 6 * 256 / tokens}
    digest = plan.readings["corpus"].digest
    assert plan.readings == {"corpus": Reading(tokens, 58 + 59, pytest.approx(seen), digest, "")}
    assert (plan.pairs, plan.width) == ([(0, 1), (1, 3)], 48)
    assert plan.teacher.parameters == sum(t.numel() for t in load_tensors(original / "teacher"))

    built = [sum(p.numel() for p in side.parameters()) for side in build_filters(plan, plan.stages[1])]
    assert [filter_parameters(plan)[side] for side in ("student", "teacher")] == built


def test_the_plan_shows_tokens_after_the_hold_out_and_epochs_and_warns_of_many_epochs(original):
    """Held-out tokens once counted as tokens to train on."""
    corpora = [{"path": str(original / "corpus"), "name": n, "validation": v} for n, v in (("few", 0.9), ("all", 0.0))]
    said = describe(make_plan(make_run(original, method="kd", data={"corpora": corpora}), 1)).splitlines()
    assert [line.split(", digest")[0] for line in said if line.startswith("corpus ")] == [
        "corpus few: 81 tokens to train on, 909 held out",
        "corpus all: 990 tokens to train on, 0 held out",
    ]
    (stage,) = (line for line in said if line.startswith("stage student: 6 steps, 1,536 tokens, epochs of few "))
    assert ", all 0." in stage
    (many,) = (line for line in said if line.startswith("many epochs: "))
    assert many.startswith("many epochs: stage student reads the 81 tokens of corpus few ")


def test_the_plan_names_a_renamed_checkpoint_and_the_rows_of_a_run_that_starts_again(world):
    """After a checkpoint was renamed, the plan once was a new run, without a warning."""
    folder = make_run(world).folder
    checkpoint = folder / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    seal(checkpoint, {}, {"step": 4, "forks": [], "validation": None})
    (checkpoint / "progress.json").write_bytes(progress_as_bytes(Progress(step=4)))
    (folder / "metrics.jsonl").write_text('{"step": 5}\n')
    assert f"resumes at step 4 of 10 from {checkpoint}" in describe(make_plan(make_run(world), 1)).splitlines()
    checkpoint.rename(checkpoint.with_name("best"))
    said = describe(make_plan(make_run(world), 1)).splitlines()
    assert "starts at step 0 of 10" in said
    assert f"no checkpoint is in {folder}/checkpoints: metrics.jsonl, now up to step 5, starts again" in said
    assert f"{folder}/checkpoints/best is not used, because its name is not step_00000004" in said


def load_tensors(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()


def test_pairs_of_a_cut_student_are_its_map_and_part_of_the_run_s_identity(world):
    teacher = make_plan(make_run(world), 1).teacher
    (world / "student" / "cut.json").write_text(json.dumps(cut_map(teacher, [0, 3])))
    plan = make_plan(make_run(world), 1)
    assert plan.identity()["pairs"] == [[0, 0], [1, 3]]
    assert "pairs (student block, teacher block), as the student was cut from the teacher: (0,0) (1,3)" in describe(
        plan
    )


@pytest.mark.parametrize(
    "half_of_it",
    [{"off_after": 0.5}, {"on_after_tokens": 768}, {"end": 0.0, "shape": "linear", "over_tokens": 768}],
    ids=["in fractions", "late", "falling to 0"],
)
def test_the_dry_run_counts_a_term_only_where_it_is_on(original, half_of_it):
    """If teacher and filters are off for half of stage II, they cost half."""
    weights = {"ce": 1.0, "kl": {"start": 1.0, **half_of_it}, "layer": {"start": 1.0, **half_of_it}}
    ce, ted, half = (
        stage_flops(plan, plan.stages[-1])
        for plan in (make_plan(make_run(original, **s), 1) for s in ({"method": "ce"}, {}, {"loss": weights}))
    )
    assert half - ce == pytest.approx((ted - ce) / 2)


def test_a_plan_without_layer_loss_has_no_pairs_and_no_filters(original):
    for method in ("ce", "kd"):
        plan = make_plan(make_run(original, method=method), 1)
        assert (plan.pairs, plan.width, plan.filters_file) == ([], 0, None)


WRONG_RUNS = {
    "tokens_per_step": (
        {"train": {"tokens_per_step": 200}},
        "train.tokens_per_step must be a multiple of micro_batch * seq_len * ranks (1 * 32 * 1 = 32), but is 200; set 192",
    ),
    "ranks of a row": (
        {"data": {"sequence_parallel": 2}},
        "data.sequence_parallel must divide the ranks (1), but is 2; change it or their number",
    ),
    "student missing": (
        {"student": {"path": "/nowhere/model"}},
        "student.path must be a folder that is there, but /nowhere/model does not exist; correct it; a hub id is OWNER/NAME",
    ),
    "teacher missing": (
        {"teacher": {"path": "./nowhere"}},
        "teacher.path must be a folder that is there, but ./nowhere does not exist; correct it; a path counts from the current "
        f"folder, {Path.cwd()}, and a hub id is OWNER/NAME",
    ),
    "seq_len": (
        {"data": {"seq_len": 256}},
        "data.seq_len must be at most the student's context (128), but is 256; lower it",
    ),
    "seq_len, which no step divides by": (
        {"data": {"seq_len": 250}},
        "data.seq_len must be at most the student's context (128), but is 250; lower it",
    ),
    "pairs": (
        {"pairs": {"explicit": [[0, 4]]}},
        "pairs.explicit[0] must name teacher blocks 0 to 3, but is [0, 4]",
    ),
    "width": (
        {"filters": {"width": 64}},
        "filters.width must be at most the teacher's (48) for filters.head = 'shared', but is 64; leave it out or use head = "
        "'per_layer'",
    ),
    "own heads": (
        {"filters": {"head": "own"}},
        "filters.head = 'own' must have student and teacher of one width, but they have 32 and 48; use 'shared' or 'per_layer'",
    ),
    "lwd width": (
        {"method": "lwd", "filters": {"width": 32}},
        "filters.width must be the teacher's (48) for lwd, but is 32",
    ),
    "filters.from": (
        {"filters": {"from": "/nowhere"}},
        "filters.from must name a run folder whose stage I is done, but /nowhere/filters.safetensors does not exist",
    ),
    "ds_config missing": (
        {"ds_config": "/zero3_whole_studnt.json"},
        "ds_config must name a readable file, but /zero3_whole_studnt.json is not: No such file or directory; did you mean "
        "ds_configs/zero3_whole_student.json?",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sections", "said"), WRONG_RUNS.values(), ids=WRONG_RUNS)
def test_a_run_that_cannot_work_is_refused(original, sections, said):
    assert refusal(original, **sections) == said


MIXING = {  # recurrent blocks between attention and beside it, and a family that ignores the borders of documents
    "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"]}, 1),
    "falcon_h1": (FalconH1Config, {}, 0),
    "stablelm": (StableLmConfig, {}, 0),
}


@pytest.mark.parametrize("family", MIXING)
def test_documents_are_refused_where_a_block_would_mix_them(world, family):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config_class, settings, apart = MIXING[family]
    config = config_class(**sizes, vocab_size=128, intermediate_size=64, **settings)
    config.save_pretrained(world / family)
    student = {"init": "random", "path": str(world / family)}
    assert make_plan(make_run(world, student=student), 1)
    documents = {"attention": "document"}
    assert make_plan(make_run(world, data=documents, student={"path": str(world / "teacher")}), 1)
    assert refusal(world, student=student, data=documents) == (
        "data.attention must be 'causal' where not all blocks keep documents apart, but is 'document' for a student of "
        f"family {family}, where {apart} of 2 blocks do; leave it out"
    )


WRONG_ROWS = {  # sections, the student's sizes, the rest of the sentence about sequence_parallel = 4
    "query heads": ({}, {"num_attention_heads": 2}, "must divide the query heads of the student (2), but is 4; change it"),
    "key heads": (
        {}, {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3},
        "must divide the key heads of the student (3) or be a multiple of them, but is 4; change it",
    ),
    "the teacher's": (
        {"teacher": {"path": "odd"}}, {"hidden_size": 48, "num_attention_heads": 6},
        "must divide the query heads of the teacher (6), but is 4; change it",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sections", "sizes", "said"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_models_whose_rows_ranks_cannot_share_are_refused(world, sections, sizes, said):
    make_model(world / "odd", "llama", **sizes)
    paths = {"student": {"path": str(world / ("student" if sections else "odd"))}}
    paths |= {"teacher": {"path": str(world / "odd")}} if sections else {}
    run = {"data": {"sequence_parallel": 4}, **paths}
    assert refusal(world, ranks=4, **run) == f"data.sequence_parallel {said}"


def test_blocks_that_mix_tokens_beside_attention_are_refused_where_ranks_share_rows(world):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    Lfm2Config(**sizes, vocab_size=128, layer_types=["conv", "full_attention"]).save_pretrained(world / "lfm2")
    student = {"init": "random", "path": str(world / "lfm2")}
    assert refusal(world, ranks=2, student=student, data={"sequence_parallel": 2}) == (
        "data.sequence_parallel must be 1 where not all blocks take part in it, but is 2 for a student of family lfm2, where 1 of "
        "2 blocks can; leave it out"
    )


def test_a_graph_of_a_block_is_refused_where_ranks_share_rows(original):
    said = refusal(original, ranks=2, fused_blocks="compile", data={"sequence_parallel": 2})
    assert said.startswith(
        "fused_blocks must be auto, liger or off where data.sequence_parallel is above 1, but is 'compile'"
    )


def test_ranks_that_share_rows_count_once_for_a_step_and_divide_what_a_rank_keeps(original):
    apart, shared = (make_plan(make_run(original, data={"sequence_parallel": n}), 4) for n in (1, 4))
    assert (apart.accumulation, shared.accumulation) == (2, 8)
    assert "step: 256 tokens = 8 accumulation * 1 micro-batch * 1 groups of ranks * 32 tokens" in describe(shared)
    kept = [memory.activations(plan, plan.stages[-1])[0] for plan in (apart, shared)]
    assert kept[0] == 4 * kept[1] > 0
    assert uncounted(apart) == []
    assert uncounted(shared) == ["what the 4 ranks of a row send each other around each attention is in no time here"]


def test_tokens_per_step_depends_on_the_ranks(original):
    assert make_plan(make_run(original), 8).accumulation == 1
    assert refusal(original, ranks=3).endswith("(1 * 32 * 3 = 96), but is 256; set 288")
    said = refusal(original, ranks=6, data={"sequence_parallel": 2})
    assert said.endswith("seq_len * ranks / data.sequence_parallel (1 * 32 * 3 = 96), but is 256; set 288")


def test_a_hub_id_that_cannot_be_reached_is_refused(original, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network\nwhatever")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", offline)
    said = refusal(original, student={"path": "nobody/no-model"})
    assert said == (
        "student.path must be a local folder or a hub id that can be reached, but nobody/no-model is no folder, and the hub does "
        f"not give it (OSError: no network); check its spelling and the network, and that a path counts from {Path.cwd()}"
    )


def test_of_a_hub_id_a_plan_fetches_no_weights_and_a_run_all(world, monkeypatch):
    asked = []

    def fetched(name, wanted):
        asked.append("*.safetensors" in wanted)
        return str(world / "teacher")

    monkeypatch.setattr(hub, "fetched", fetched)
    run = make_run(world, teacher={"path": "somebody/teacher"})
    plan_of_models(run, 1, needs_weights=False)
    plan_of_models(run, 1)
    assert asked == [False, True]


def test_a_value_that_can_only_be_a_path_is_not_looked_up_on_the_hub(world, monkeypatch):
    """A typing mistake in --tokenizer once took a minute and a half of retries."""
    monkeypatch.setattr(hub, "fetched", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(world.parent)
    assert refusal(world, teacher={"path": "world/techer"}) == (
        "teacher.path must be a folder that is there, but world/techer does not exist; did you mean world/teacher?"
    )
    assert refusal(world, teacher={"path": "world/other/lost"}) == (
        "teacher.path must be a folder that is there, but world/other/lost does not exist; correct it; a path counts from the "
        f"current folder, {Path.cwd()}, and a hub id is OWNER/NAME"
    )
    with pytest.raises(
        UserError, match=r"--tokenizer must be a folder .* world/studnt .*; did you mean world/student\?"
    ):
        load_tokenizer("world/studnt")
    (world / "teacher.gguf").touch()
    assert refusal(world, teacher={"path": "world/teacher.gguf"}) == (
        "teacher.path must be a folder, but world/teacher.gguf is a GGUF file, whose weights are rounded for inference; name the "
        "folder of the model that it was made of"
    )
    weights = str(world / "student" / "model.safetensors")
    assert refusal(world, student={"path": weights}).endswith(" is a file; name the folder that it is in")


def test_a_model_without_safetensors_is_refused_unless_it_starts_random(world):
    (world / "student" / "model.safetensors").rename(world / "student" / "pytorch_model.bin")
    said = refusal(world)
    assert (
        said
        == "student.path must hold *.safetensors weights, but ROOT/student has none; save the model with save_pretrained, or, if "
        'it is new, set student.init = "random"'
    )
    assert make_plan(make_run(world, student={"init": "random"}), 1)


@pytest.mark.parametrize("key", ["optimizer", "bf16", "gradient_clipping", "train_micro_batch_size_per_gpu"])
def test_a_ds_config_that_sets_what_the_run_file_owns_is_refused(world, key):
    (world / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, key: 1}))
    said = refusal(world, ds_config=str(world / "ds.json"))
    assert said.startswith(f"ds_config ROOT/ds.json must leave {key} to the run file, but sets it; set ")


def damage(root: Path, fault: str) -> None:
    idx, data = root / "corpus.idx", root / "corpus.bin"
    actions = {
        "no index": idx.unlink,
        "no tokens": data.unlink,
        "short index": lambda: idx.write_bytes(idx.read_bytes()[:-9]),
        "short tokens": lambda: data.write_bytes(data.read_bytes()[:-2]),
        "foreign index": lambda: idx.write_bytes(b"PK\x03\x04" * 100),
        "empty index": lambda: idx.write_bytes(b""),
        "large ids": lambda: make_shard(root / "corpus", largest=128),
    }
    actions[fault]()


CORPORA = {
    "no index": "corpus file ROOT/corpus.idx must exist, but is missing",
    "no tokens": "corpus file ROOT/corpus.bin must exist, but is missing",
    "short index": "corpus file ROOT/corpus.idx must have the size that its counts ask for, but is truncated",
    "short tokens": "corpus file ROOT/corpus.bin must hold 1980 bytes as its .idx says, but is 1978 long",
    "foreign index": "corpus file ROOT/corpus.idx must be a Megatron index, but starts with b'PK",
    "empty index": "corpus file ROOT/corpus.idx must be a Megatron index, but starts with b''",
    "large ids": "corpus shard ROOT/corpus must hold token ids in 0..127 (vocabulary size 128), but holds 128",
}


@pytest.mark.parametrize("fault", CORPORA)
def test_a_damaged_corpus_is_refused(world, fault):
    damage(world, fault)
    assert refusal(world).startswith(CORPORA[fault])


def test_corpora_of_weight_0_alone_are_refused(original):
    corpora = [{"path": str(original / "corpus"), "weight": 0.0}]
    assert refusal(original, data={"corpora": corpora}) == "data.corpora must have a weight above 0, but all are 0"


def give_tokenizer(folder: Path, tokens: list[str], **special) -> None:
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), **special).save_pretrained(folder)


WORDS = [f"w{i}" for i in range(120)]


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(world):
    give_tokenizer(world / "teacher", WORDS)
    give_tokenizer(world / "student", [*WORDS[:7], "other", *WORDS[8:]])
    said = refusal(world)
    assert said == (
        "student.path must have the teacher's tokenizer, but id 7 is 'other' in ROOT/student and 'w7' in ROOT/teacher; "
        "choose a student of the same tokenizer"
    )


def test_the_same_tokenizer_is_accepted_whatever_the_vocabularies_are_padded_to(world):
    make_model(world / "student", "gpt2", num_hidden_layers=2, vocab_size=192)
    give_tokenizer(world / "teacher", WORDS)
    give_tokenizer(world / "student", WORDS)
    plan = make_plan(make_run(world), 1)
    assert (plan.student.vocab_size, plan.teacher.vocab_size) == (192, 128)


def test_tokens_that_only_one_side_has_are_accepted(world):
    """Families add special tokens where the other's vocabulary is padding."""
    give_tokenizer(world / "teacher", WORDS)
    give_tokenizer(world / "student", [*WORDS, "<new>"])
    assert make_plan(make_run(world), 1)


def test_a_broken_tokenizer_is_refused(world):
    for side in ("teacher", "student"):
        give_tokenizer(world / side, WORDS)
    (world / "student" / "tokenizer.json").write_text("{")
    assert refusal(world).startswith("ROOT/student must hold a readable tokenizer, but does not load (")


def sign(prefix: Path, value: str) -> None:
    """Write `value` into a shard's sidecar as the digest of its tokenizer."""
    sidecar = prefix.with_name(prefix.name + ".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "tokenizer_digest": value}))


def test_a_corpus_of_another_tokenizer_than_the_student_s_is_refused(world):
    for side in ("teacher", "student"):
        give_tokenizer(world / side, WORDS, eos_token="w2")
    sign(world / "corpus", digest(load_tokenizer(str(world / "student"))))
    assert make_plan(make_run(world), 1)
    sign(world / "corpus", "another's")
    assert refusal(world) == (
        "data.corpora must be written with the student's tokenizer, but ROOT/corpus is written with another than the one "
        "in ROOT/student; tokenize it again with --tokenizer ROOT/student"
    )


def test_a_signed_corpus_is_accepted_where_the_student_has_no_tokenizer_and_refused_where_it_cannot_end_documents(
    world,
):
    sign(world / "corpus", "some tokenizer's")
    assert make_plan(make_run(world), 1)
    for side in ("teacher", "student"):
        give_tokenizer(world / side, WORDS)
    assert refusal(world).startswith("student.path ROOT/student must have an end-of-sequence token")


def test_corpora_of_two_tokenizers_are_refused(world):
    make_shard(world / "other")
    corpora = [{"path": str(world / name)} for name in ("corpus", "other")]
    sign(world / "corpus", "one")
    assert make_plan(make_run(world, data={"corpora": corpora}), 1)
    sign(world / "other", "two")
    assert refusal(world, data={"corpora": corpora}) == (
        "data.corpora must be written with one tokenizer, but ROOT/other is written with another than ROOT/corpus; "
        "tokenize one of them again"
    )


@pytest.mark.parametrize("file", ["runs", "runs/tiny"])
def test_a_file_where_the_run_s_folder_must_be_is_refused(world, file):
    (world / file).parent.mkdir(exist_ok=True)
    (world / file).write_text("in the way")
    said = refusal(world)
    assert said == f"runs must be a folder this user can write, but ROOT/{file} is not; set runs or change its mode"


def test_weights_and_biases_online_without_a_key_is_a_line_of_the_dry_run(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for mode, warns in (("online", True), ("auto", False)):
        said = describe(make_plan(make_run(world, wandb={"project": "p", "mode": mode}), 1))
        assert ("W&B will be offline, because there is no API key: set WANDB_API_KEY" in said) is warns


def test_a_dry_run_writes_packs_and_says_so_and_ted_scale_plan_writes_none(world, capsys, monkeypatch):
    run = make_run(world, data={"packing": "examples", "attention": "document"})
    plan_of_models(run, 1, needs_weights=False)
    assert not list(world.rglob("*.packs-*"))
    make_plan(run, 1)
    assert list(world.rglob("*.packs-*"))
    monkeypatch.setattr(pretrain_module.signals, "listen", lambda: None)  # this process keeps its handlers
    with pytest.raises(SystemExit):
        pretrain_module.main(["--help"])
    assert "packs of examples that are not there are made" in " ".join(capsys.readouterr().out.split())


def test_what_takes_long_at_a_start_is_said_before_it_begins_and_on_rank_0_alone(world, monkeypatch, capsys, caplog):
    """A start was silent for minutes: while ranks meet, while models load."""

    class Begun(Exception):
        """What takes long."""

    def begin(*_, **__):
        raise Begun

    file = write_run(world / "run.toml", make_run(world, teacher={"placement": "replicated"}))
    monkeypatch.setattr(pretrain_module.signals, "listen", lambda: None)  # this process keeps its handlers
    monkeypatch.setattr(run_module, "run_plan", begin)
    monkeypatch.setattr(console, "level", logging.INFO)
    for rank, words, lines in (("0", [], 1), ("1", [], 0), ("0", ["--quiet"], 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(Begun):
            pretrain_module.main(["--config", str(file), *words])
        said = capsys.readouterr().err
        assert said.count("run tiny: looking at its models") == lines
        assert said.count("1 rank starts; the first start on a machine may compile") == lines
    plan = make_plan(load_run(file), 1)
    caplog.set_level(logging.INFO, "ted_scale")
    monkeypatch.setattr(engines, "bare_teacher", begin)
    monkeypatch.setattr(engines, "build_network", begin)
    with pytest.raises(Begun):
        engines.build_teacher(plan)
    assert caplog.messages[-1].startswith(f"loading {world / 'teacher'}, ")
    with pytest.raises(Begun):
        engines.build_student(plan, plan.stages[-1], None, None)
    assert caplog.messages[-1].startswith(f"loading {world / 'student'}, ")


def test_a_report_that_nothing_can_draw_is_a_line_of_the_dry_run(world, monkeypatch):
    for minutes, found, warns in ((10, None, True), (10, "bokeh", False), (0, None, False)):
        monkeypatch.setattr(live_report, "find_spec", lambda _, found=found: found)
        said = describe(make_plan(make_run(world, report={"every_minutes": minutes}), 1))
        assert ("report.every_minutes = 10 writes no page, because Bokeh is not installed" in said) is warns


def test_a_mistake_in_the_zero_section_is_a_sentence_and_not_deepspeed_s_traceback(world):
    config = {"zero_optimization": {"stage": 3, "overlap_com": True}}
    (world / "ds.json").write_text(json.dumps(config))
    plan = make_plan(make_run(world, ds_config=str(world / "ds.json")), 1)
    with pytest.raises(
        UserError, match=r"ds.json: zero_optimization.overlap_com must be what DeepSpeed knows, but is true"
    ):
        check_engine_config(plan)


@pytest.mark.parametrize(
    "section", [{"communication_data_type": "fp99"}, {"comms_logger": {"enabled": "x"}}, {"timers": 5}]
)
def test_a_mistake_in_another_section_of_a_ds_config_is_a_sentence_too(world, section):
    (world / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, **section}))
    plan = make_plan(make_run(world, ds_config=str(world / "ds.json")), 1)
    with pytest.raises(UserError, match=r"ds.json must be what DeepSpeed takes, but is not: .*; correct it") as caught:
        check_engine_config(plan)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "sections"),
    [
        ("transformer.h.0.ln_1.weight of the student has 32 on 64", {"method": "ce", "teacher": None}),
        ("a filter's bias has 12 on 2", {"filters": {"width": 12}}),
        (None, {"method": "kd", "teacher": {"placement": "replicated"}}),
    ],
)
def test_weights_that_are_gathered_in_8_bits_divide_into_eights(world, said, sections):
    """Those of a teacher that every rank has whole are not gathered."""
    (world / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}))
    ranks = 64 if said and " on 64" in said else 2
    train = {"tokens_per_step": 32 * ranks}
    plan = make_plan(make_run(world, ds_config=str(world / "ds.json"), train=train, **sections), ranks)
    if said is None:
        assert check_engine_config(plan) is None
        return
    with pytest.raises(
        UserError, match=f"part of a weight is no multiple of 8 elements, but {said} ranks; leave it out"
    ):
        check_engine_config(plan)
