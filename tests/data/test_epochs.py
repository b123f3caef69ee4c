"""train.epochs as steps: so many rows of the corpus, rounded up to whole steps, and no other meaning."""

from fractions import Fraction

import pytest
from corpus import counting_documents, write_shard
from tiny import make_run, run_values

from ted_scale.base.errors import UserError
from ted_scale.checkpoints.progress import Progress
from ted_scale.commands import supervised_run
from ted_scale.config import changes
from ted_scale.config.run import Run
from ted_scale.config.run_file import load_run, to_toml
from ted_scale.data import epochs, order
from ted_scale.data.stream import open_stream, refuse_repetition

SEVERAL = {"epochs_of": "b"}


def run_of(root, of_train, **data):
    """Two corpora of 20 and 100 documents; the first one alone without `epochs_of`."""
    for name, count in (("a", 20), ("b", 100)):
        write_shard(root / name, counting_documents([5 + i % 9 for i in range(count)], first=1))
    corpora = [{"path": str(root / name), "validation": 0.2, "weight": w} for name, w in (("a", 3.0), ("b", 1.0))]
    values = run_values(
        root, data={"seq_len": 16, "corpora": corpora if "epochs_of" in of_train else corpora[:1], **data}
    )
    values["train"] = {**values["train"], "tokens_per_step": 16 * 3, **of_train}
    del values["train"]["steps"]
    return Run.model_validate(values)


PACKED = {"packing": "examples", "attention": "document"}


@pytest.mark.parametrize("data", [{}, PACKED], ids=["windows", "examples"])
@pytest.mark.parametrize("more", [{}, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("count", [0.1, 1, 2.5])
def test_epochs_are_the_fewest_steps_that_read_so_many_rows_of_the_corpus(tmp_path, data, more, count):
    run = epochs.resolved(run_of(tmp_path, {"epochs": count, **more}, **data))
    stream = open_stream(run.data, run.seed, 1 << 16)
    which = len(stream.parts) - 1
    packs = stream.packs.get("b" if more else "a")
    # The windows of an epoch need a label after the last one, at any offset: docs/data.md.
    rows = packs.counts.packs if packs else (stream.interval.domains[which].tokens - 16) // 16
    read = [
        order.taken(3 * n, stream.interval.shares, stream.interval.key)[which]
        for n in (run.train.steps - 1, run.train.steps)
    ]
    assert read[0] < Fraction(str(count)) * rows <= read[1]


@pytest.mark.parametrize("data", [{}, PACKED], ids=["windows", "examples"])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_an_epoch_of_a_corpus_that_must_not_repeat_is_as_many_whole_steps_as_it_has(tmp_path, data, rows):
    asked = run_of(tmp_path, {"epochs": 1, "tokens_per_step": 16 * rows}, **data)
    once = [corpus.model_copy(update={"repeat": False}) for corpus in asked.data.corpora]
    run = epochs.resolved(asked.model_copy(update={"data": asked.data.model_copy(update={"corpora": once})}))
    stream = open_stream(run.data, run.seed, 1 << 16)
    refuse_repetition(run.data, stream, rows * run.train.steps)
    with pytest.raises(UserError, match=r"data.corpora\[0\].repeat must be true"):
        refuse_repetition(run.data, stream, rows * (run.train.steps + 1))


def test_the_run_file_of_the_folder_has_the_steps_and_can_be_started(tmp_path):
    asked = run_of(tmp_path, {"epochs": 2})
    run = epochs.resolved(asked)
    (tmp_path / "run.toml").write_text(to_toml(run))
    assert load_run(tmp_path / "run.toml").train.steps == run.train.steps
    (tmp_path / "asked.toml").write_text(to_toml(asked))
    assert load_run(tmp_path / "asked.toml") == asked
    assert load_run(tmp_path / "asked.toml", ["train.steps=7"]).train.steps == 7


def test_a_supervised_run_is_done_by_the_epochs_that_are_asked_for_now(tmp_path, monkeypatch):
    """The run file in its folder has the steps of the epochs before."""
    one, two = (run_of(tmp_path, {"epochs": count}).model_copy(update={"runs": str(tmp_path)}) for count in (1, 2))
    once = epochs.resolved(one)
    once.folder.mkdir()
    (once.folder / "run.toml").write_text(to_toml(once))
    whole = Progress(once.filters.steps + once.train.steps, run=changes.as_written(once))
    monkeypatch.setattr(supervised_run.files, "newest_checkpoint", lambda folder: folder)
    monkeypatch.setattr(supervised_run, "read_progress", lambda checkpoint: whole)
    assert supervised_run.is_done(one) and not supervised_run.is_done(two)


def test_what_the_steps_do_not_fit_is_refused_once_they_are_known(tmp_path):
    with pytest.raises(UserError, match=r"train.epochs = 1 is \d steps: train.warmup_steps must be below train.steps"):
        epochs.resolved(run_of(tmp_path, {"epochs": 1, "warmup_steps": 50}))


def test_several_corpora_need_the_one_whose_epochs_count(tmp_path):
    values = make_run(tmp_path).model_dump(by_alias=True, exclude_none=True)
    values["data"]["corpora"] = [{"path": "a"}, {"path": "b"}]
    values["train"] = {"epochs": 3, "tokens_per_step": 256, "micro_batch": 1, "lr": 1e-3}
    with pytest.raises(
        ValueError, match=r"train\.epochs_of must be set where several corpora are read, but is missing"
    ):
        Run.model_validate(values)
