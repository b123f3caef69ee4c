"""The run file: what is refused and in which words, what presets and --set may change, and that it reads itself
back."""

import json
import re
from pathlib import Path

import pytest
import tomli_w
from places import ROOT
from tiny import run_values

from ted_scale.base.errors import UserError, shown
from ted_scale.config.ds_config import CANNOT, DS_OWNED_BY_RUN, USABLE, load_ds_config
from ted_scale.config.run import Run
from ted_scale.config.run_file import CALLED, load_run, to_toml


def write(path: Path, values: dict) -> Path:
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, drop=(), **sections) -> Run:
    values = {k: v for k, v in run_values(folder, **sections).items() if k not in drop}
    return load_run(write(folder / "run.toml", values), overrides)


def refusal(folder: Path, *overrides: str, drop=(), **sections) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, *overrides, drop=drop, **sections)
    said = str(caught.value)
    assert "\n" not in said
    blamed = [f"{folder}/run.toml", *(f"--set {override.partition('=')[0]}" for override in overrides)]
    return next((said.removeprefix(f"{who}: ") for who in blamed if said.startswith(f"{who}: ")), said)


UNKNOWN = {
    "loss.kll=1": "unknown key loss.kll; did you mean loss.kl?",
    "trian.lr=1": "unknown key trian; did you mean train?",
    "lr=1": "unknown key lr; did you mean filters.lr or train.lr?",
    "train.path='x'": "unknown key train.path; did you mean student.path or teacher.path?",
    "filters.from_run='x'": "unknown key filters.from_run; did you mean filters.from?",
    "loss.kl={start=1, sharpe='linear'}": "unknown key loss.kl.sharpe; did you mean loss.kl.shape?",
    "data.corpora=[{path='a'}, {path='b', wieght=2}]": (
        "unknown key data.corpora[1].wieght; did you mean data.corpora[1].weight?"
    ),
    "zzz=1": "unknown key zzz",
    "train.learning_rate=1": "unknown key train.learning_rate; did you mean train.lr?",
    "max_steps=1": "unknown key max_steps; did you mean train.steps?",
    "data.mask_documents=true": "unknown key data.mask_documents; write data.attention = 'document' instead",
    "data.attention='documents'": "data.attention must be 'causal' or 'document', but is 'documents'",
}


def test_filters_that_do_not_train_have_no_stage_one(tmp_path):
    assert refusal(tmp_path, "filters.lr=0").startswith(
        "filters.steps must be 0 where filters.lr is 0, but is 4: such a stage I"
    )
    assert load(tmp_path, "filters.lr=0", "filters.steps=0").filters.lr == 0


@pytest.mark.parametrize("override", UNKNOWN)
def test_an_unknown_key_is_named_with_its_section_and_the_key_that_was_meant(tmp_path, override):
    assert refusal(tmp_path, override) == UNKNOWN[override]


WRONG = {
    "train.steps=1.5": "train.steps must be a valid integer, but is 1.5",
    "train.steps='5'": "train.steps must be a valid integer, but is '5'",
    "train.steps=true": "train.steps must be a valid integer, but is true",
    "train.steps=0": "train.steps must be greater than 0, but is 0",
    "train={tokens_per_step=256, micro_batch=1, lr=1e-3}": "train.steps must be set, but is missing; or set train.epochs",
    "train={steps=6, epochs=3, tokens_per_step=256, micro_batch=1, lr=1e-3}": "train.steps must be left out where epochs are "
    "given (3), but is 6; keep one",
    "train.epochs=0": "train.epochs must be greater than 0, but is 0",
    "train={epochs=1, epochs_of='x', tokens_per_step=256, micro_batch=1, lr=1e-3}": "train.epochs_of must be a corpus with a "
    "weight above 0 (corpus), but is 'x'",
    "checkpoint.best='val/suite/x/acc'": "checkpoint.best must be what a validation measures (val/loss, val/ppl; "
    "val/suite/TASK/METRIC with validation.suite), but is 'val/suite/x/acc'",
    "checkpoint.best='val/suite/x/other'": "checkpoint.best_is must be set where it is not known which value of checkpoint.best is "
    "best, but is missing for 'val/suite/x/other'; set 'lowest' or 'highest'",
    "checkpoint={best='val/ppl', every=2}": "validation.every must be above 0 where checkpoint.best is 'val/ppl', but is 0: only "
    "the end would be measured",
    "checkpoint.best_is='lowest'": "checkpoint.best_is must be left out without checkpoint.best, but is 'lowest'; set best, too",
    "train.lr=inf": "train.lr must be a finite number, but is inf",
    "train.lr=nan": "train.lr must be a finite number, but is nan",
    "train.precision='fp16'": "train.precision must be 'bf16' or 'fp32', but is 'fp16'",
    "train.betas=[0.9, 1.0]": "train.betas[1] must be less than 1, but is 1.0",
    "train.betas=[0.9]": "train.betas[1] must be set, but is missing",
    "train.betas=0.9": "train.betas must be a valid list, but is 0.9",
    "train.warmup_steps=6": "train.warmup_steps must be below train.steps (6), but is 6",
    "train.min_lr=0.1": "train.min_lr must be at most train.lr (0.001), but is 0.1",
    "loss.kl='high'": "loss.kl must be a valid number, but is 'high'",
    "loss.kl=-1": "loss.kl must be greater than or equal to 0, but is -1",
    "loss.kl={start=-1}": "loss.kl.start must be greater than or equal to 0, but is -1",
    "loss.kl={end=1, shape='linear'}": "loss.kl.start must be set, but is missing",
    "loss.kl={start=1, end=0}": "loss.kl.shape must be linear or cosine when end is set, but is 'constant'",
    "loss.kl={start=1, shape='linear'}": "loss.kl.end must be set when shape is 'linear', but is missing",
    "loss.preset='papr'": "loss.preset must be 'paper', 'hint', 'states_first', 'wsd' or 'let', but is 'papr'",
    "loss.preset=['paper']": "loss.preset must be 'paper', 'hint', 'states_first', 'wsd' or 'let', but is ['paper']",
    "loss={mode='strict', divergence='jsd'}": "loss.divergence must be 'forward' where loss.mode is 'strict', but is 'jsd'; use "
    "'chunked'",
    "loss={mode='strict', skip_low_entropy=0.15}": "loss.skip_low_entropy must be 0.0 where loss.mode is 'strict', but is 0.15; "
    "use 'chunked'",
    "loss.skip_low_entropy=1.0": "loss.skip_low_entropy must be less than 1, but is 1.0",
    "loss={mode='strict', top_k=64}": "loss.top_k must be 0 where loss.mode is 'strict', but is 64; use 'chunked'",
    "loss={backend='triton', top_k=64}": "loss.top_k must be 0 where loss.backend is 'triton', but is 64; Triton has no kernel "
    "for it: use 'auto'",
    "teacher={path='t', precision='fp8', placement='node'}": "teacher.placement must be 'auto' or 'replicated' where "
    "teacher.precision is 'fp8', but is 'node'; leave one of them out",
    "teacher={path='t', compile=true, placement='offload'}": "teacher.placement must be 'auto' or 'replicated' where "
    "teacher.compile is true, but is 'offload'; leave one of them out",
    "teacher.precision='int4'": "teacher.precision must be 'bf16', 'fp8' or 'int8', but is 'int4'",
    "teacher={path='t', precision='int8'}": "teacher.precision must be left out where train.precision is 'fp32', but is 'int8': "
    "the states of both models have one type",
    "data.corpora=[]": "data.corpora must have at least 1 item, but is []",
    "data.corpora=['a']": "data.corpora[0] must be a section of keys, but is 'a'",
    "pairs.explicit=[[0, 1], [1]]": "pairs.explicit[1][1] must be set, but is missing",
    "pairs.explicit=[[0, 1, 2]]": "pairs.explicit[0] must have at most 2 items, but is [0, 1, 2]",
    "student='gpt2'": "student must be a section of keys, but is 'gpt2'",
    "name='a b'": "name must match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', but is 'a b'",
    "wandb.tags=['a']": "wandb.project must be set, but is missing",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_refused_as_what_it_must_be_and_what_it_is(tmp_path, override):
    assert refusal(tmp_path, override) == WRONG[override]


def test_a_missing_section_is_named(tmp_path):
    assert refusal(tmp_path, drop=["train"]) == "train must be set, but is missing"


@pytest.mark.parametrize("method", ["kd", "lwd", "ted"])
def test_a_method_that_learns_from_a_teacher_needs_one(tmp_path, method):
    said = refusal(tmp_path, drop=["teacher"], method=method)
    assert said == f"teacher.path must be set for method = '{method}', but there is no [teacher]"


def test_ce_needs_no_teacher(tmp_path):
    assert load(tmp_path, drop=["teacher"], method="ce").teacher is None


def test_a_file_that_is_missing_or_not_toml_is_refused_by_name(tmp_path):
    with pytest.raises(
        UserError, match=r"--config must name a readable run file, but .*nowhere.toml is not: No such file"
    ):
        load_run(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(UserError, match=r"bad.toml must be valid TOML, but is not: .*line 1"):
        load_run(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary.toml must be valid TOML"):
        load_run(tmp_path / "binary.toml")


def test_the_mark_that_windows_puts_before_utf8_is_no_key(tmp_path):
    path = write(tmp_path / "run.toml", run_values(tmp_path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_run(path).name


def test_workers_of_an_earlier_version_load_without_effect(tmp_path, caplog):
    assert load(tmp_path, "data.workers=0") == load(tmp_path) and not caplog.records
    assert load(tmp_path, "data.workers=2") == load(tmp_path)
    assert caplog.messages == ["data.workers = 2 has no effect any more: a thread reads; leave it out"]
    for workers in (-1, "'x'"):
        said = f"data.workers must be left out, for a thread reads, but is {workers}; leave it out"
        assert refusal(tmp_path, f"data.workers={workers}") == said


def test_set_reads_toml_values_and_takes_a_bare_word_as_a_string(tmp_path):
    run = load(tmp_path, "train.lr=2e-4", "name=my-run", "data.attention=document", "wandb.project=ted", "loss.kl=2",
               "filters.from=/some/run", "wandb.tags=['a', 'b=c']", "pairs.explicit=[[0, 3]]")  # fmt: skip
    assert (run.train.lr, run.name, run.data.attention, run.loss.kl) == (2e-4, "my-run", "document", 2.0)
    assert (run.wandb.project, run.wandb.tags, run.filters.from_run) == ("ted", ["a", "b=c"], "/some/run")
    assert run.pairs.explicit == [(0, 3)]
    assert run.train.steps == 6  # what --set does not name stays as the file has it


def test_the_sentence_names_the_file_or_the_set_that_is_wrong(tmp_path):
    """Every mistake in a --set was the run file's."""
    for blamed, overrides, steps in (
        (f"{tmp_path}/run.toml", ["train.lr=1", "seed=7"], 0),
        ("--set train.steps", ["train.lr=1", "train.steps=0", "seed=7"], 6),
        ("--set train.warmup_steps", ["train.warmup_steps=9"], 6),
        ("--set train.steps", ["train.warmup_steps=5", "train.steps=4"], 6),
    ):
        values = run_values(tmp_path, train={"steps": steps})
        with pytest.raises(UserError) as caught:
            load_run(write(tmp_path / "run.toml", values), overrides)
        assert str(caught.value).startswith(f"{blamed}: train.")


def test_a_key_named_as_in_other_trainers_suggests_ours(tmp_path):
    values = load(tmp_path).model_dump(by_alias=True)
    assert all(re.sub(r".*\.", "", key) in values[key.partition(".")[0]] if "." in key else key in values
               for key in CALLED.values())  # fmt: skip


@pytest.mark.parametrize("override", ["train.lr", "=3"])
def test_set_without_key_or_value_is_refused(tmp_path, override):
    assert refusal(tmp_path, override) == f"--set must look like section.key=value, but is '{override}'"


def test_set_below_a_plain_value_is_refused(tmp_path):
    said = refusal(tmp_path, "name.first=x")
    assert said == "--set must name a key of a section, but name in 'name.first=x' is not a section"


def test_a_preset_fills_only_what_is_not_written(tmp_path):
    paper = load(tmp_path, "loss.preset=paper").loss
    assert (paper.temperature, paper.kind, paper.kl) == (2.0, "mse", 1.0)
    written = load(tmp_path, "loss.preset=paper", "loss.temperature=1").loss
    assert (written.temperature, written.kind) == (1.0, "mse")
    assert load(tmp_path, "loss.preset=let").pairs.rule == "late_to_early"
    assert load(tmp_path, "loss.preset=let", "pairs.rule=last").pairs.rule == "last"
    hint = load(tmp_path, "loss.preset=hint").loss.layer
    assert (hint.start, hint.off_after) == (1.0, 0.1)
    assert load(tmp_path, "loss.preset=hint", "loss.layer=3").loss.layer == 3.0


ROUND_TRIPS = {
    "plain": [],
    "schedules": [
        "loss.kl={start=1, end=0.25, shape='cosine', off_after=0.75}",
        "loss.layer={start=3, end=0, shape='linear', over_tokens=1000, on_after_tokens=500}",
        "loss.ce={start=0, end=1, shape='linear'}",
    ],
    "presets": ["loss.preset=hint", "loss.temperature=3"],
    "pairs": ["pairs.explicit=[[0, 1], [1, 3]]", "pairs.skip_last=1"],
    "corpora": ["data.corpora=[{path='a', weight=0.3}, {path='b c', validation=0.01}]"],
    "wandb": [
        "wandb.project=p",
        "wandb.tags=['x', 'y\"z']",
        "wandb.notes='Größe 😀 \\\\ tab\\u0009'",
        "wandb.mode=offline",
    ],
    "control characters": ['wandb={project="p", notes="bell\\u0007 del\\u007f line\\n"}'],
    "filters": ["filters.from=/a/run", "filters.width=64", "filters.head=per_layer", "filters.lr=1e-9"],
    "numbers": ["train.lr=1e-30", "train.min_lr=0", "train.eps=1e-12", "loss.kl=1e22", "train.betas=[0, 0.999999]"],
}


@pytest.mark.parametrize("overrides", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_the_resolved_run_reads_itself_back(tmp_path, overrides):
    run = load(tmp_path, *overrides)
    (tmp_path / "resolved.toml").write_text(to_toml(run), encoding="utf-8")
    again = load_run(tmp_path / "resolved.toml")
    assert again == run
    assert to_toml(again) == to_toml(run)


def test_the_resolved_run_shows_what_presets_and_defaults_decided(tmp_path):
    text = to_toml(load(tmp_path, "loss.preset=paper"))
    assert re.search(r"^kind = \"mse\"$", text, re.M) and re.search(r"^temperature = 2.0$", text, re.M)
    assert "weight_decay = 0.1" in text


@pytest.mark.parametrize("key", DS_OWNED_BY_RUN)
def test_a_ds_config_may_not_set_what_the_run_file_owns(tmp_path, key):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: {}}))
    with pytest.raises(
        UserError, match=f"must leave {key} to the run file, but sets it; set {DS_OWNED_BY_RUN[key]} there"
    ):
        load_ds_config(str(path))


def test_keys_that_a_ds_config_refers_to_are_keys_of_the_run_file(tmp_path):
    values = load(tmp_path, "wandb.project=p").model_dump(by_alias=True)
    for home in DS_OWNED_BY_RUN.values():
        found = values
        for part in home.split("."):
            found = found[part]


DS_FAULTS = {
    "{": "must be valid JSON, but is not",
    "[]": "must be a JSON object with a zero_optimization section, but is not",
    '{"zero_optimization": true}': "must be a JSON object with a zero_optimization section, but is not",
    '{"zero_optimization": {"stage": 2}}': "zero_optimization.stage must be 3, but is 2",
    '{"zero_optimization": {}}': "zero_optimization.stage must be 3, but is missing",
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}': "offload_param.device must be cpu or none",
}


IMPOSSIBLE = {  # DeepSpeed takes most of it, and ends the run minutes later or passes over it in silence
    "zero_hpz_partition_size": (8, "its groups are made once, and teacher and student are two models"),
    "mics_shard_size": (8, "DeepSpeed no longer has it"),
    "zero_quantized_nontrainable_weights": (True, "teacher.precision gives a frozen model 8 bits"),
    "zero_quantized_gradients": (
        True,
        "gradients of 8 bits were not tried; communication_data_type = bf16 halves what is sent",
    ),
    "zenflow": ({}, "torch's fused AdamW updates"),
    "cpu_offload": (True, "offload_optimizer and offload_param replace it"),
    "elastic_checkpoint": (True, "DeepSpeed no longer has it"),
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_zero_options_that_cannot_work_are_refused_unless_they_are_off(tmp_path, key):
    value, reason = IMPOSSIBLE[key]
    path, off = tmp_path / "ds.json", 1 if key == "zero_hpz_partition_size" else False
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, key: off}}))
    assert load_ds_config(str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, key: value}}))
    with pytest.raises(UserError) as caught:
        load_ds_config(str(path))
    said = f"ds_config {path} must do without zero_optimization.{key}, but has {shown(value)}: {reason}"
    assert str(caught.value).startswith(said)


SECTIONS = {
    "tensor_parallel": "must do without tensor_parallel, but has it: ZeRO-3 alone splits the models; leave it out",
    "hybrid_engine": "must do without hybrid_engine, but has it: engines only run forward, backward and step",
    "flops_profiler": "must do without flops_profiler, but has it: engines only run forward, backward and step",
    "compile": "must do without compile, but has it: engines only run forward, backward and step, as they are",
    "data_types": "must do without data_types, but has it: gradients are averaged over ranks, in fp32 sums",
    "elasticity": "must do without elasticity, but has it: DeepSpeed no longer has it; leave it out",
    "communication_datatype": "known here, but has 'communication_datatype'; did you mean communication_data_type?",
    "gradient_clip": "known here, but has 'gradient_clip'; did you mean gradient_clipping?",
    "my_notes": "must have sections that are known here, but has 'my_notes'; leave it out",
}


@pytest.mark.parametrize("key", SECTIONS)
def test_ds_config_sections_that_are_ignored_harmful_or_unknown_are_refused(tmp_path, key):
    """DeepSpeed passes over sections that it does not know."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: {}}))
    with pytest.raises(UserError, match=re.escape(f"ds_config {path} must ")) as caught:
        load_ds_config(str(path))
    assert SECTIONS[key] in str(caught.value)


def test_every_section_that_this_deepspeed_knows_of_is_usable_owned_or_refused_with_a_reason():
    """So that a newer one's are looked at."""
    from deepspeed.runtime import config

    source = Path(config.__file__).read_text()
    read = set(re.findall(r"param_dict\[?(?:\.get\()?['\"]([a-z_]+)['\"]", source)) | set(
        config._REMOVED_TOP_LEVEL_CONFIG_KEYS
    )
    assert {"pipeline", "hybrid_engine", "compile", "nebula"} <= read
    known = {*USABLE, *DS_OWNED_BY_RUN, *(key for keys in CANNOT.values() for key in keys)}
    assert read <= known


def test_the_default_ds_config_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_ds_config(load(tmp_path, drop=["ds_config"]).ds_config)["zero_optimization"]["stage"] == 3
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text("{")
    with pytest.raises(UserError, match="must be valid JSON"):  # one's own comes first
        load_ds_config("ds_configs/zero3.json")


@pytest.mark.parametrize("text", DS_FAULTS)
def test_a_ds_config_must_be_json_of_zero_stage_3(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(DS_FAULTS[text])):
        load_ds_config(str(tmp_path / "ds.json"))


def test_every_shipped_ds_config_is_accepted():
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert files
    assert all(load_ds_config(str(f))["zero_optimization"]["stage"] == 3 for f in files)


def test_every_shipped_run_file_loads_and_names_a_ds_config_that_does():
    files = sorted((ROOT / "launch" / "runs").glob("*.toml"))
    assert files
    for file in files:
        run = load_run(file)
        assert load_ds_config(str(ROOT / run.ds_config)), file


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["method=ce", "loss.preset=states_first"],
            "a term of method = 'ce' must be on in every step, but from 0% of stage II",
        ),
        (["loss.ce={start=1, off_after=0.5}", "loss.kl=0", "loss.layer=0"], "but from 50% of stage II on loss.ce"),
        (["loss.preset=states_first", "teacher.every=2"], "teacher.every must be 1 where loss.ce is 0, but is 2"),
        (
            ["loss.ce={start=1, end=0, shape='linear', over_tokens=768}", "loss.kl=0", "loss.layer=0"],
            "but from 50% of stage II on loss.ce",
        ),
        (
            ["loss.ce={start=1, off_after_tokens=768}", "loss.kl=0", "loss.layer=0"],
            "but from 50% of stage II on loss.ce",
        ),
        (["loss.ce={start=1, on_after_tokens=768}", "teacher.every=2"], "teacher.every must be 1 where loss.ce is 0"),
        (["loss.ce={start=1, on_after=0.6, off_after=0.5}"], "on_after must be below off_after (0.5), but is 0.6"),
    ],
)
def test_a_step_that_would_teach_nothing_is_refused(tmp_path, words, sentence):
    assert sentence in refusal(tmp_path, *words)


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (
            "start=1, over_tokens=9",
            "loss.kl.over_tokens must be left out when shape is 'constant', but is 9; only linear and",
        ),
        ("start=1, shape='rate', over_tokens=9", "over_tokens must be left out when shape is 'rate', but is 9; only"),
        (
            "start=1, end=0, shape='linear', over_tokens=1537",
            "loss.kl.over_tokens must be at most the tokens of stage II (1536), but is 1537, so the weight would never be at its "
            "end; lower it, or leave it out and the end is that of the stage",
        ),
        (
            "start=1, on_after=0.5, on_after_tokens=9",
            "on_after must not be set beside on_after_tokens, but is 0.5; keep",
        ),
        (
            "start=1, on_after_tokens=1536",
            "loss.kl must begin within stage II (1536 tokens) and before it ends, but begins after 1 of it and ends after 1; ",
        ),
        ("start=1, on_after_tokens=768, off_after=0.25", "but begins after 0.5 of it and ends after 0.25; change its"),
    ],
)
def test_a_schedule_in_tokens_that_makes_no_sense_is_refused(tmp_path, schedule, sentence):
    assert sentence in refusal(tmp_path, f"loss.kl={{{schedule}}}")


def test_a_schedule_of_a_term_that_the_method_does_not_have_is_not_looked_at(tmp_path):
    assert load(tmp_path, "method=ce", "loss.kl={start=1, on_after_tokens=9999}").method == "ce"
