"""ted-scale task: rows of known data sets become pairs and a judge; a side of the split; what is refused."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ted_scale.base.errors import UserError
from ted_scale.commands import task
from ted_scale.corpora import sides
from ted_scale.corpora.tasks import TASKS, item_of

ROOT = Path(__file__).resolve().parents[2]
LABELLED = {"label": 1, "idx": 0}
ROWS = {
    "boolq": {"passage": "P.", "question": "is it", "answer": True},
    "commonsense_qa": {"question": "Q?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
    "piqa": {"goal": "G", "sol1": "x", "sol2": "y ", "label": 1},
    "sciq": {"question": "Q?", "support": "", "distractor1": "x", "distractor2": "v", "distractor3": "w", "correct_answer": "y"},
    "squad": {"context": "C.", "question": "Q?", "answers": {"text": ["y", "y", "z"], "answer_start": [0, 0, 5]}},
    "cola": {"sentence": "S ", **LABELLED},
    "sst2": {"sentence": "S ", **LABELLED},
    "qnli": {"question": "Q?", "sentence": "S", **LABELLED},
    "qqp": {"question1": "P?", "question2": "Q?", **LABELLED},
    "mnli": {"premise": "P", "hypothesis": "H", **LABELLED},
    **{name: {"sentence1": "P", "sentence2": "H", **LABELLED} for name in ("mrpc", "rte", "wnli")},
}  # fmt: skip
PAIRS = {
    "boolq": ("P.\nQuestion: is it?\nAnswer:", " yes"),
    "commonsense_qa": ("Question: Q?\nAnswer:", " y"),
    "piqa": ("Question: G\nAnswer:", " y"),
    "sciq": ("Question: Q?\nAnswer:", " y"),
    "squad": ("C.\nQuestion: Q?\nAnswer:", " y"),
    "cola": ("Sentence: S\nAcceptable:", " yes"),
    "sst2": ("Review: S\nSentiment:", " positive"),
    "qnli": ("Question: Q?\nSentence: S\nAnswered:", " no"),
    "qqp": ("Question 1: P?\nQuestion 2: Q?\nSame meaning:", " yes"),
    "mnli": ("Premise: P\nHypothesis: H\nRelation:", " neutral"),
    "mrpc": ("Sentence 1: P\nSentence 2: H\nParaphrase:", " yes"),
    "rte": ("Premise: P\nHypothesis: H\nEntailment:", " no"),
    "wnli": ("Premise: P\nHypothesis: H\nEntailment:", " yes"),
}

QUESTION = {"question": "Q?", "id": "1", "answers": [{"text": "y", "answer_start": 0}]}


@pytest.mark.parametrize("name", TASKS)
def test_each_task_has_its_template_and_its_answer_begins_with_a_space(name):
    item = item_of(TASKS[name], ROWS[name])
    assert (item.prompt, item.completion) == PAIRS[name]
    assert all(answer[0] == " " != answer[1:2] for answer in item.answers)


@pytest.mark.parametrize("name", TASKS)
def test_the_document_has_each_template(name):
    template = TASKS[name].template.replace("\n", "\\n")
    assert f"| `{name}` | `{template}` |" in (ROOT / "docs/tasks.md").read_text()


def test_what_a_model_may_write_is_each_accepted_answer_once_or_that_there_is_none():
    assert item_of(TASKS["squad"], ROWS["squad"]).answers == [" y", " z"]
    none = ROWS["squad"] | {"answers": {"text": [], "answer_start": []}}
    assert item_of(TASKS["squad"], none).answers == [" unanswerable"]


def test_items_that_share_a_text_by_way_of_others_are_on_one_side_whatever_their_order():
    chain = [[f"a{k}", f"a{k + 1}"] for k in range(40)]
    alone = [[f"b{k}"] for k in range(1000)]
    held = sides.is_held_out(chain + alone)
    assert len({*held[:40]}) == 1
    assert sides.is_held_out((chain + alone)[::-1]) == held[::-1]
    assert 150 < sum(held[40:]) < 250


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_becomes_pairs_and_what_the_judge_asks_and_a_split_of_its_own_has_another_name(tmp_path, capsys):
    rows = [{"sentence": f"film {n}", "label": n % 2} for n in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    task.main(["sst2", "--data", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "own")])
    train, held_out = lines(tmp_path / "own/train.jsonl"), lines(tmp_path / "own/held_out.jsonl")
    assert {row["prompt"] for row in train + held_out} == {f"Review: film {n}\nSentiment:" for n in range(50)}
    assert len(train) + len(held_out) == 50 and 0 < len(held_out) < 25
    assert held_out[0]["choices"] == [" negative", " positive"] and held_out[0]["answer"] in (0, 1)
    assert "task: sst2_split\n" in (tmp_path / "own/sst2_split.yaml").read_text()
    assert "never stand beside those of the public task" in capsys.readouterr().out

    files = [write(tmp_path / f"{name}.jsonl", rows[:n]) for name, n in (("train", 5), ("dev", 6))]
    task.main(["sst2", "--data", files[0], "--held-out", files[1], "--out", str(tmp_path / "given")])
    assert [len(lines(tmp_path / f"given/{name}.jsonl")) for name in ("train", "held_out")] == [5, 6]
    assert (tmp_path / "given/sst2_held_out.yaml").exists() and "never" not in (said := capsys.readouterr().out)
    assert "5 prompts are on both sides" in said
    with pytest.raises(UserError, match="--held-out must have items that --data has not, but has none"):
        task.main(["sst2", "--data", files[1], "--held-out", files[0], "--out", str(tmp_path / "same")])


def test_a_folder_that_is_written_again_has_only_the_judge_of_its_held_out_items(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in range(50)])
    others = write(tmp_path / "b.jsonl", [{"sentence": "another film", "label": 0}])
    for more, judge in (([], "split"), (["--held-out", others], "held_out"), ([], "split")):
        task.main(["sst2", "--data", data, *more, "--out", str(tmp_path / "out")])
        assert [file.name for file in (tmp_path / "out").glob("*.yaml")] == [f"sst2_{judge}.yaml"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sst2", 'sentence\tlabel\nS \t1\n'),
        ("cola", "gj04\t1\t\tS\n"),
        ("mrpc", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tP\tH\n"),
        ("qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tP?\tQ?\t1\n4\tcut short\n"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\tP\tH\tnot_entailment\n"),
        ("mnli", "index\tsentence1\tsentence2\tgold_label\n0\tP\tH\tneutral\n"),
        ("squad", json.dumps({"data": [{"paragraphs": [{"context": "C.", "qas": [QUESTION]}]}]})),
    ],
)  # fmt: skip
def test_the_authors_own_files_give_the_items_of_the_tables_on_the_hub(tmp_path, name, text):
    (path := tmp_path / ("dev.json" if name == "squad" else "dev.tsv")).write_text(text)
    (item,) = task.items_in(name, [str(path)])
    assert (item.prompt, item.completion) == PAIRS[name]


def test_an_own_file_in_another_form_is_refused_with_the_way_out(tmp_path):
    (path := tmp_path / "dev.json").write_text('{"version": "1.1"}')
    with pytest.raises(
        UserError, match=r"dev.json must be as squad's authors wrote it, .*KeyError: 'data'.*JSON lines"
    ):
        task.items_in("squad", [str(path)])
    (path := tmp_path / "dev.tsv").write_text('sentence\tlabel\na "b\t-1\n')
    with pytest.raises(UserError, match=r"dev.tsv:2 must have a label of 0 to 1, but has -1, as a test split"):
        task.items_in("sst2", [str(path)])


def test_a_held_out_item_is_a_pair_too_and_the_items_to_train_on_may_be_conversations(tmp_path):
    rows, others = (write(tmp_path / f"{q}.jsonl", [ROWS["sciq"] | {"question": q}]) for q in ("Q?", "R?"))
    task.main(["sciq", "--data", rows, "--held-out", others, "--conversations", "--out", str(tmp_path / "chat")])
    (held_out,), (train,) = lines(tmp_path / "chat/held_out.jsonl"), lines(tmp_path / "chat/train.jsonl")
    assert (held_out["prompt"].replace("R?", "Q?"), held_out["completion"]) == PAIRS["sciq"]
    assert train == {"messages": [{"role": "user", "content": PAIRS["sciq"][0]}, {"role": "assistant", "content": "y"}]}


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("sst2", {"label": -1}, r"a.jsonl:2 must have a label of 0 to 1, but has -1, as a test .*train or validation"),
        ("mnli", {"label": 3}, r"a.jsonl:2 must have a label of 0 to 2, but has 3; correct the row"),
        ("sst2", {"label": True}, r"a.jsonl:2 must have a label of 0 to 1, but has true; correct the row"),
        ("commonsense_qa", {"answerKey": ""}, r"a.jsonl:2 must have a letter .*, as a test split whose answers are"),
        ("commonsense_qa", {"choices": ["x"]}, r"a.jsonl:2 must have lists of text and label in choices, but has \['x'\]"),
        ("boolq", {"answer": "yes"}, r"a.jsonl:2 must have true or false in answer, but has 'yes'"),
        ("piqa", {"sol2": " "}, r"a.jsonl:2 must have a text in each answer, but 1 of 2 are empty"),
        ("sciq", {"question": None}, r"a.jsonl:2 must have text in question, but has null"),
        ("sst2", {"sentence": " "}, r"a.jsonl:2 must have a text in sentence, but has none"),
        ("qqp", {"question1": "", "question2": " "}, r"a.jsonl:2 must have a text in question1 or question2, but has none"),
        ("sst2", {"sentence": "\ud800"}, r"a.jsonl:2 must have text in sentence, but spells half of a surrogate pair"),
        ("piqa", {"sol2": "\ud800"}, r"a.jsonl:2 must have text in answer, but spells half of a surrogate pair"),
        ("squad", {"context": ...}, r"a.jsonl:2 must have the column context, but has question, answers"),
    ],
)  # fmt: skip
def test_what_is_no_row_of_the_task_is_refused_by_its_line(tmp_path, name, change, sentence):
    row = {key: value for key, value in (ROWS[name] | change).items() if value is not ...}
    data = write(tmp_path / "a.jsonl", [ROWS[name], row])
    with pytest.raises(UserError, match=sentence):
        task.main([name, "--data", data, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_data_without_items_and_a_folder_of_another_task_are_refused(tmp_path):
    def refused(sentence, name="sst2", data=tmp_path / "none"):
        with pytest.raises(UserError, match=sentence):
            task.main([name, "--data", str(data), "--out", str(tmp_path / "out")])

    (tmp_path / "none").mkdir()
    refused(r"none must hold text, .jsonl, .parquet or .arrow files, but holds none")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    refused(r"a.parquet must have a column sentence, but has text; rename one", data=tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("\n")
    refused(r"b.jsonl must hold rows of sst2, but holds none", data=tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text("[1]\n")
    refused(r"b.jsonl:1 must be a JSON object, but is list", data=tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text("{\n")
    refused(r"b.jsonl:1 must be a JSON object, but is not \(.*\); correct it", data=tmp_path / "b.jsonl")
    one = write(tmp_path / "c.jsonl", [ROWS["sst2"]] * 3)
    refused(r"--data must have items that are unlike enough .*all 3 fall on one side", data=one)
    other = write(tmp_path / "d.jsonl", [{"sentence": "T", "label": 0}])
    task.main(["sst2", "--data", one, "--held-out", other, "--out", str(tmp_path / "out")])
    refused(r"--out must be a folder of rte alone, but .* has sst2_held_out.yaml", name="rte", data=one)
