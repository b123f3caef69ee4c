"""`init`: the run file that it writes is read, planned and started; its defaults are the config's; each value fits."""

import json
import re

import pytest
from places import ROOT
from tiny import make_corpus, make_model, pretrain

from ted_scale.base.errors import UserError
from ted_scale.commands import first_run, init, run_text, tokenize_corpus, train_tokenizer
from ted_scale.commands.first_run import Choice, Given
from ted_scale.config.run import Run
from ted_scale.config.run_file import keys_of, load_run, section_in
from ted_scale.distill.pairs import shape_of
from ted_scale.forecast.placement import Rank
from ted_scale.models.inspection import inspect
from ted_scale.plan import make_plan

CPU, GPU = Rank("cpu", 16 * 2**30, 1), Rank("cuda", 80e9, 8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher with its tokenizer, and a folder of text."""
    home = tmp_path_factory.mktemp("home")
    (home / "my text").mkdir()
    for page in sorted((ROOT / "docs").glob("*.md")):
        (home / "my text" / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    train_tokenizer.main(["--vocab-size", "400", "--out", str(home / "teacher"), str(home / "my text")])
    make_model(home / "teacher", "llama", vocab_size=400)
    (home / "ds_configs").symlink_to(ROOT / "ds_configs")
    return home


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    for name in ("teacher", "my text", "ds_configs"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init.logging, "disable", lambda _: None)
    return tmp_path


def chosen(**more) -> dict[str, Choice]:
    required = {
        "name": "a", "method": "ted", "student.path": "s", "teacher.path": "t", "data.seq_len": 32,
        "data.corpora": [{"path": "c", "validation": 0.1}], "train.steps": 40, "train.tokens_per_step": 64_000,
        "train.micro_batch": 1, "train.lr": 1e-3,
    }  # fmt: skip
    return {key: Choice(value, "why " * 60) for key, value in {**required, **more}.items()}


def test_every_default_in_the_file_is_the_configs_own(tmp_path):
    text = run_text.text_of(chosen(), ["a head"])
    assert not [line for line in text.splitlines() if len(line) > 132]
    (tmp_path / "as_written.toml").write_text(text)
    (tmp_path / "without_marks.toml").write_text(re.sub(r"(?m)^#(?=\S)", "", text))
    as_written, without_marks = (load_run(tmp_path / f"{n}.toml") for n in ("as_written", "without_marks"))
    assert without_marks.wandb.project
    assert without_marks.model_copy(update={"wandb": None}) == as_written
    assert as_written.train.tokens_per_step == 64_000 and "tokens_per_step = 64_000" in text


@pytest.mark.parametrize("known", [run_text.KEYS, {k: v for k, v in run_text.KEYS.items() if k != "limits"}])
def test_every_section_of_a_run_file_is_there_also_a_new_one(known, monkeypatch):
    monkeypatch.setattr(run_text, "KEYS", known)
    text = run_text.text_of(chosen(), [])
    sections = {name for name, field in keys_of(Run).items() if section_in(field.annotation) and name != "wandb"}
    assert sections <= set(re.findall(r"(?m)^\[(\w+)\]$", text))
    assert ("#silence_s" in text) == ("limits" not in known)


@pytest.mark.long
def test_with_prepare_one_more_command_trains_the_own_text(here, capsys):
    init.main(["--teacher", "teacher", "--text", "my text", "--out", "own.toml", "--prepare", "--ranks", "1"])
    said, steps = capsys.readouterr()
    assert "looking for the block that does least: 3 are left, 2 stay" in steps and "fitting block 2 of 2" in steps
    assert (here / "corpora/my_text.idx").exists() and (here / "models/teacher_2_blocks/cut.json").exists()
    assert "ted-scale tokenize" not in said.partition("next:")[2] and "cut-student" not in said.partition("next:")[2]
    run = load_run("own.toml")
    assert make_plan(run, 1).stages[-1].steps == run.train.steps
    words = ["--set", "train.steps=2", "--set", "train.warmup_steps=1", "--set", "validation.tokens=128"]
    done = pretrain("--config", "own.toml", *words, cwd=here, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "runs/own is at step 2" in done.stderr


def test_with_prepare_a_corpus_of_another_text_is_refused_and_one_of_several_shards_is_taken(here):
    tokenize_corpus.main(
        ["--tokenizer", "teacher", "--out", "corpora/my_text", "--shard-tokens", "50000", str(here / "my text")]
    )
    assert not (here / "corpora/my_text.idx").exists() and init.has_shards("corpora/my_text")
    places = init.Places("teacher", "student", "corpora/my_text", "my text", None, 128)
    assert init.prepared(places) == places._replace(text=None)
    (here / "elsewhere" / "my text").mkdir(parents=True)
    (here / "elsewhere" / "my text" / "a.txt").write_text("another text")
    with pytest.raises(UserError, match=r"--text elsewhere/my text must be what corpora/my_text was made of"):
        init.main(["--teacher", "teacher", "--text", "elsewhere/my text", "--prepare", "--ranks", "1"])
    assert not (here / "models").exists()


def test_a_student_that_was_cut_from_another_teacher_is_refused(here):
    make_model(here / "models/teacher_2_blocks", "llama", num_hidden_layers=2, vocab_size=400)
    shape = {**shape_of(inspect("t", "teacher", needs_weights=False)), "width": 1}
    (here / "models/teacher_2_blocks/cut.json").write_text(json.dumps({"blocks": [0, 3], "teacher": shape}))
    with pytest.raises(UserError, match=r"must be the one that models/teacher_2_blocks was cut from"):
        init.main(["--teacher", "teacher", "--text", "my text", "--ranks", "1"])
    shape["width"] = inspect("t", "teacher", needs_weights=False).width
    (here / "models/teacher_2_blocks/cut.json").write_text(json.dumps({"blocks": [0, 3], "teacher": shape}))
    init.main(["--teacher", "teacher", "--text", "my text", "--ranks", "1"])


def test_without_prepare_nothing_is_made_and_the_commands_lead_there(here, capsys):
    init.main(["--teacher", "teacher", "--text", "my text", "--ranks", "1"])
    said = capsys.readouterr().out
    assert sorted(path.name for path in here.iterdir()) == ["ds_configs", "my text", "run.toml", "teacher"]
    estimated = int(re.search(r"([\d,]+) tokens by estimate", said)[1].replace(",", ""))
    commands = [line.strip() for line in said.partition("next:")[2].splitlines() if line.strip()]
    tokenize, cut = (init.shlex.split(line)[2:] for line in commands[:2])
    init.prepared(init.Places("teacher", cut[1], "corpora/my_text", "my text", None, 128))
    assert tokenize[2:] == ["--out", "corpora/my_text", "my text"]
    assert init.count("corpora/my_text") == pytest.approx(estimated, rel=0.1)
    assert "--dry-run" in commands[2] and commands[3] == "ted-scale pretrain --config run.toml"


def test_steps_are_of_the_text_that_is_not_held_out(here, monkeypatch):
    """It warned of its own run file: more than 4 epochs."""
    monkeypatch.setattr(first_run, "STEPS", 10**6)  # as many as pay
    make_corpus(here / "shards" / "a", vocabulary=400)
    make_model(here / "small", "llama", num_hidden_layers=2, vocab_size=400)
    init.main(["--teacher", "teacher", "--text", "shards", "--student", "small", "--ranks", "1"])
    assert 3.5 < make_plan(load_run("run.toml"), 1).readings["shards"].epochs["student"] <= first_run.EPOCHS


def test_shards_and_a_student_that_are_there_are_taken_as_they_are(here, capsys):
    make_corpus(here / "shards" / "a", vocabulary=400)
    make_model(here / "small", "llama", num_hidden_layers=2, vocab_size=400)
    init.main(["--teacher", "teacher", "--text", "shards", "--student", "small", "--ranks", "2"])
    run = load_run("run.toml")
    assert (run.data.corpora[0].path, run.student.path) == ("shards", "small")
    assert "deepspeed --num_gpus 2 --module ted_scale.commands.pretrain --config run.toml" in capsys.readouterr().out
    with pytest.raises(UserError, match="--out must be a new file"):
        init.main(["--teacher", "teacher", "--text", "shards", "--student", "small"])


def test_the_quick_start_s_run_file_starts_as_the_quick_start_starts_it_and_on_one_rank(here, capsys):
    """It was written for one rank and started with two, which a step of little text does not divide among."""
    quick = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    words = init.shlex.split(re.search(r"(?m)^ted-scale init (.+)$", quick)[1])
    started = int(re.search(r"--num_gpus (\d+) launch/pretrain.py --config run.toml", quick)[1])
    make_corpus(here / "shards" / "a", vocabulary=400, documents=40)
    make_model(here / "small", "llama", num_hidden_layers=2, vocab_size=400)
    values = {"models/TEACHER": "teacher", "MY_TEXT": "shards"}
    init.main([values.get(word, word) for word in words] + ["--student", "small"])
    assert f"for {started} ranks; for others run init again with --ranks N --overwrite" in capsys.readouterr().out
    run = load_run("run.toml")
    assert [make_plan(run, ranks).world for ranks in (1, started)] == [1, started]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--teacher", "techer", "--text", "my text"],
            "--teacher must be a folder that is there.*did you mean teacher",
        ),
        (["--teacher", "teacher", "--text", "nowhere"], "input nowhere must exist"),
        (["--teacher", "teacher", "--text", "my text", "--layers", "9"], "--layers must be from 1 to the teacher's"),
        (["--teacher", "teacher", "--text", "my text", "--ranks", "0"], "--ranks must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(here, words, said):
    with pytest.raises(UserError, match=said):
        init.main(words)
    assert not (here / "run.toml").exists()


@pytest.mark.parametrize("tokens", [1024, 50_000, 10**7, 10**12])
@pytest.mark.parametrize(("rank", "world"), [(CPU, 1), (CPU, 3), (GPU, 8)])
@pytest.mark.parametrize("length", [None, 100, 131_072])
def test_what_is_chosen_fits_text_models_and_ranks(tokens, rank, world, length):
    given = Given(tokens, length, 50_000_000, rank, world)
    text = {key: choice.value for key, choice in first_run.of_text(given).items()}
    seq_len = text["data.seq_len"]
    assert first_run.SHORTEST_ROW <= seq_len <= min(length or 4096, 4096)
    assert seq_len <= text["validation.tokens"] <= text["validation"] * tokens + 1
    for micro_batch in (1, 4):
        steps = {key: choice.value for key, choice in first_run.of_budget(given, seq_len, micro_batch).items()}
        assert steps["train.tokens_per_step"] % (micro_batch * seq_len * world) == 0
        assert steps["train.warmup_steps"] < steps["train.steps"] <= first_run.STEPS
        assert steps["train.tokens_per_step"] <= max(micro_batch * seq_len * world, 2**19)


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="--text must have at least 1,024 tokens, but has 1,023"):
        first_run.of_text(Given(1023, None, 10**6, CPU, 1))


def test_less_memory_means_fewer_rows_and_then_checkpointing(here):
    make_model(here / "small", "llama", num_hidden_layers=2, vocab_size=400)
    corpora = [{"path": "c", "validation": 0.1}]
    values = {
        "name": "a", "method": "ted", "student": {"path": "small"}, "teacher": {"path": "teacher"},
        "data": {"seq_len": 128, "corpora": corpora},
        "train": {"steps": 2, "micro_batch": 1, "tokens_per_step": 128, "lr": 1e-3, "precision": "fp32"},
    }  # fmt: skip
    plan, found = first_run.plan_to_size(values, 1), []
    for gib in (16, first_run.needs(plan, CPU, 2, False) / 0.8, 1e-6):
        rank = CPU._replace(memory=gib * 2**30)
        choices = first_run.of_memory(plan, Given(10**7, 128, 10**5, rank, 1))
        found.append((choices["train.micro_batch"].value, choices["student.gradient_checkpointing"].value))
    assert found == [(8, False), (2, False), (1, True)]
    assert "NONE FITS" in choices["train.micro_batch"].why
