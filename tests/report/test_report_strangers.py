"""A folder of anybody's files has a page: no number and no text in them ends the report."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import made, rows_of

from ted_scale.report.curves import charts
from ted_scale.report.folder import read_run
from ted_scale.report.page import render

NINES = "9" * 400


def page(*folders: Path) -> str:
    whole = render([read_run(folder) for folder in folders])
    whole.encode()
    assert "Where it stands" in whole
    return whole


def scored(model="m", **more) -> str:
    score = {"what": "a", "metric": "b", "value": 1} | more
    return json.dumps({"models": [{"model": model, "scores": [score]}]})


def row(**values) -> str:
    return json.dumps({"step": 1, "tokens": 9, "loss/total": 1.5} | values) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", row(**{"new/\ud800": 1.0}), "?"),
        ("metrics.jsonl", row(step=10**18), "1 line that is torn"),
        ("metrics.jsonl", row(**{"perf/step_ms": 1e299}), "1 line that is torn"),
        ("metrics.jsonl", row(**{"perf/step_ms": -1.0}), "1 line that is torn"),
        ("metrics.jsonl", row(**{"loss/layer/" + "9" * 5000: 1.0}), "Where it stands"),
        ("metrics.jsonl", row(step=10**14), "100,000,000,000,000"),
        ("samples.jsonl", json.dumps({"prompt": "a", "student": "b\ud800"}), "b?"),
        ("log.txt", f"step {NINES}: x\nstep {NINES * 13} x\nstarts at step {NINES} of 3\n", "Where it stands"),
        ("run.toml", f"[train]\nsteps = {NINES}\n", NINES),
        ("run.toml", f"seed = 0x{'f' * 5000}\n", "run.toml is damaged"),
        ("evaluation.json", scored(3), "is no file of scores"),
        ("evaluation.json", scored(error="x"), "is no file of scores"),
        ("evaluation.json", scored("m\ud800"), "m?"),
    ],
)  # fmt: skip
def test_what_no_page_can_hold_is_left_out_or_said(tmp_path, name, text, said):
    folder = made(tmp_path, steps=4)
    (folder / name).write_text(text)
    assert said in page(folder)


def test_two_runs_of_strangers_have_a_page(tmp_path):
    assert "There is no interval" in page(made(tmp_path, name="a", seed="[1]"), made(tmp_path, name="b"))


def test_every_chart_has_an_id_of_its_own(tmp_path):
    names = {f"data/{corpus}/tokens": 1.0 for corpus in ("日本", "中国")} | {"日本/a": 1.0, "中国/a": 1.0}
    folders = [
        made(tmp_path, name=name, steps=8, rows=[one | names for one in rows_of("ce", 8, 0, 1, 0.0)]) for name in "ab"
    ]
    keys = [chart.key for made in charts([read_run(folder) for folder in folders]).values() for chart in made]
    assert len(keys) == len({*keys, "more"}) - 1


def raw(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


numbers = st.integers(-(10**19), 10**19) | st.floats() | st.sampled_from([10**14, 10**15, 10**400, 1e299, 1e-320])
words = st.text(st.characters(), max_size=6) | st.sampled_from(["step", "tokens", "perf/step_ms", "val/loss", "x/y/3"])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
counts = st.integers(0, 2**62)
keys = st.sampled_from(["loss/total", "loss/layer/1", "val/loss", "perf/step_ms", "checkpoint/write_ms"]) | words
rows = st.builds(
    lambda step, tokens, more: {**more, "step": step, "tokens": tokens},
    counts, counts, st.dictionaries(keys, numbers, max_size=4),
)  # fmt: skip
lines = st.lists((rows | values).map(json.dumps), max_size=6).map("\n".join)
begins, ends = st.sampled_from(["", "10:00:00 ", "starts at "]), st.sampled_from([": ", " of 3"])
logs = st.lists(st.builds("{}step {}{}{}".format, begins, numbers, ends, words), max_size=4).map("\n".join)
samples = st.lists(st.fixed_dictionaries({"prompt": words, "student": words}, optional={"step": values}), max_size=3)
score = st.fixed_dictionaries({"what": values, "metric": values, "value": values}, optional={"error": values})
models = st.fixed_dictionaries({"model": values, "scores": st.lists(score, max_size=2)})
a_value = st.sampled_from(["1", '"ted"', "[[1], 2]", NINES, "0x" + NINES * 13, "1e400", "nan", "{a = 1}"])
likely = {
    "metrics.jsonl": lines,
    "run.toml": st.builds("seed = {}\nmethod = {}\n[train]\nsteps = {}\n".format, a_value, a_value, a_value),
    "log.txt": logs,
    "life.json": st.builds(lambda step, at: json.dumps({"step": step, "spent": {"at": at}}), numbers, numbers),
    "samples.jsonl": samples.map(lambda found: "\n".join(map(json.dumps, found))),
    "evaluation.json": models.map(lambda model: json.dumps({"models": [model]})),
}
anything = st.binary(max_size=40) | values.map(json.dumps).map(raw)
files = st.fixed_dictionaries({name: texts.map(raw) | anything for name, texts in likely.items()})


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(files, min_size=1, max_size=2))
def test_whatever_the_files_of_a_folder_hold_there_is_a_page(folders):
    with tempfile.TemporaryDirectory() as place:
        for number, held in enumerate(folders):
            folder = Path(place, str(number))
            folder.mkdir()
            for name, content in held.items():
                (folder / name).write_bytes(content)
        page(*sorted(Path(place).iterdir()))
