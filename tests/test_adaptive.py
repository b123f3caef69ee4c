"""DDK's blend: the rule against a plain numpy version, and real ranks that follow it over three kinds of real text."""

import io
import math
import pydoc_data.topics
import sysconfig
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from corpus import write_shard
from data_scenarios import DOMAINS
from scenarios import rows
from test_distributed import launch, result, without_clocks
from tiny import make_model, make_run

from ted_scale.base.errors import RunStopped, UserError
from ted_scale.checkpoints.folder import newest_checkpoint
from ted_scale.checkpoints.progress import Progress, read_progress
from ted_scale.config.run_file import load_run
from ted_scale.data import blend, ddk, order
from ted_scale.feed import known_of_teacher, refuse_no_number, text_of


def plain_ddk(student, teacher, before, alpha, prior=1.0):
    """The paper's formulas: perplexities in, r_0 (there without a prior, and not smoothed) or r_t+1 out."""
    ratio = numpy.asarray(student) / numpy.asarray(teacher)
    psi = numpy.asarray(prior if before is None else before) * numpy.exp(ratio)
    return alpha * psi / psi.sum() + (1 - alpha) / len(psi)


def test_the_rule_is_the_paper_s_over_many_measurements():
    draw = numpy.random.default_rng(0)
    teacher = draw.uniform(1.0, 3.0, 10)
    weights, plain = None, None
    for _ in range(30):
        student = teacher + draw.uniform(-0.1, 1.5, 10)
        gaps = ddk.discrepancies(list(student), list(teacher))
        weights = ddk.first_weights([1.0] * 10, gaps, 0.5) if weights is None else ddk.next_weights(weights, gaps, 0.5)
        plain = plain_ddk(numpy.exp(student), numpy.exp(teacher), plain, 0.5)
        assert weights == pytest.approx(plain, rel=1e-12)
        assert math.fsum(weights) == pytest.approx(1.0)


def test_an_untrained_student_causes_no_overflow():
    gaps = ddk.discrepancies([900.0, 11.0, 2.0], [1.0, 1.0, 2.5])
    weights = ddk.next_weights(ddk.first_weights([1.0, 1.0, 1.0], gaps, 0.5), gaps, 0.5)
    assert weights == pytest.approx([0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3])


def test_without_smoothing_a_corpus_may_fall_to_zero_and_stays_there():
    weights = ddk.next_weights([1.0, 0.0], [1.0, 50.0], 1.0)
    assert weights == [1.0, 0.0]


def test_the_first_shares_start_from_the_run_file_s_weights():
    assert ddk.first_weights([2.0, 1.0], [1.2, 1.2], 1.0) == pytest.approx([2 / 3, 1 / 3])


def test_the_first_measurement_gives_no_corpus_a_zero_share():
    """One corpus, on which the student's perplexity was 10,000 times the teacher's, once got all samples."""
    weights = ddk.first_weights([1.0, 1.0, 1.0], [1e4, 1.0, 1.0], 0.5)
    assert weights == pytest.approx([0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3])


def test_a_nonfinite_loss_is_reported_with_its_corpus():
    with pytest.raises(
        RunStopped, match="step 7: the student's loss on what corpus code holds out must be finite, but is nan"
    ):
        refuse_no_number(7, {"student": {"prose": 1.0, "code": math.nan}, "teacher": {"prose": 1.0, "code": 1.0}})


def test_losses_of_another_teacher_are_measured_again():
    def known_by(path):
        corpora = [{"path": "a", "validation": 0.1}]
        run = make_run(Path("nowhere"), teacher={"path": path}, data={"corpora": corpora})
        streams = {"a": SimpleNamespace(parts={"a": SimpleNamespace(tokens=100, content="c")})}
        plan = SimpleNamespace(run=run)
        progress = Progress(adaptive={"teacher": {"a": 3.0}, "text": text_of(SimpleNamespace(run=base), streams)})
        return known_of_teacher(plan, progress, streams)

    base = make_run(Path("nowhere"), teacher={"path": "base"}, data={"corpora": [{"path": "a", "validation": 0.1}]})
    assert known_by("base") == {"a": 3.0} and known_by("instruct") == {}


ADAPTIVE = {"data": {"blend": {"kind": "adaptive"}}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"method": "ce", "data": {"corpora": [{"path": "a", "validation": 0.1}]}}, "for method = 'ce'"),
        (
            {"data": {"corpora": [{"path": "a", "validation": 0.1}, {"path": "b"}]}},
            r"data.corpora\[1\].validation must",
        ),
    ],
)
def test_an_adaptive_blend_without_something_to_measure_is_refused(tmp_path, sections, said):
    from tiny import write_run

    run = make_run(tmp_path, **sections)
    path = write_run(tmp_path / "run.toml", run)
    assert load_run(path)
    with pytest.raises(UserError, match=said):
        load_run(path, ["data.blend.kind=adaptive"])


def texts() -> dict[str, list[str]]:
    """Three kinds of text that every installation of Python has: descriptions of packages, their code, and the reference of
    the language."""
    library = Path(sysconfig.get_path("stdlib"))
    about = [distribution.metadata.get_payload() or "" for distribution in metadata.distributions()]
    return {
        "prose": sorted(text for text in about if len(text) > 500),
        "code": [path.read_text(errors="replace") for path in sorted(library.glob("a*.py"))],
        "reference": list(pydoc_data.topics.topics.values()),
    }


def as_bytes(documents: list[str], limit: int = 60_000) -> list[list[int]]:
    """The vocabulary is ASCII."""
    kept, left = [], io.StringIO()
    for text in documents:
        ids = [byte for byte in text.encode() if 0 < byte < 128][:4000]
        if ids and left.tell() < limit:
            left.write(" " * len(ids))
            kept.append(ids)
    return kept


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptive")
    make_model(folder / "teacher", "llama", num_hidden_layers=4, hidden_size=48)
    make_model(folder / "student", "gpt2", num_hidden_layers=2, seed=1)
    for name, documents in texts().items():
        write_shard(folder / name, as_bytes(documents))
    write_shard(folder / "short", [[k % 127 + 1 for k in range(100)]] * 8)  # 20 windows of 32 tokens to train on
    launch(folder, 2, ("adaptive", "other_data", "runs_out"))
    return folder


def measured(folder: Path, name: str = "adaptive") -> list[dict]:
    return [row for row in rows(folder, name) if "blend/code/weight" in row]


def test_a_run_over_prose_code_and_reference_follows_the_rule(world):
    result(world, "adaptive")
    found, plain = measured(world), None
    assert [row["step"] for row in found] == [2, 6, 10]
    for row in found:
        student, teacher = ([row[f"blend/{n}/{key}"] for n in DOMAINS] for key in ("ppl", "teacher_ppl"))
        plain = plain_ddk(student, teacher, plain, 0.5, prior=numpy.array([1.0, 2.0, 1.0]))
        assert [row[f"blend/{n}/weight"] for n in DOMAINS] == pytest.approx(plain, rel=1e-9)
        assert [row[f"blend/{n}/discrepancy"] for n in DOMAINS] == pytest.approx(numpy.divide(student, teacher))
    assert len({row["blend/code/weight"] for row in found}) == 3
    assert len({row["blend/code/teacher_ppl"] for row in found}) == 1


def test_samples_have_the_measured_shares_from_the_measurement_on(world):
    for row in measured(world):
        checkpoint = world / f"runs/adaptive/checkpoints/step_{row['step'] + 1:08d}"
        interval = blend.from_record(read_progress(checkpoint).blend)
        weights = [row[f"blend/{name}/weight"] for name in DOMAINS]
        assert (interval.start, interval.shares) == ((row["step"] - 2) * 8, order.shares(weights))


@pytest.mark.parametrize("step", [6, 8], ids=["where it is measured", "between two measurements"])
def test_a_killed_run_goes_on_with_the_same_weights_and_samples(world, step):
    straight, resumed = (without_clocks(world, name) for name in ("adaptive", f"adaptive_from_{step}"))
    assert resumed == straight


def test_a_corpus_that_would_repeat_after_a_measurement_ends_the_run_with_a_checkpoint(world):
    for rank in (0, 1):
        said = result(world, "runs_out", rank)
        assert "data.corpora[1].repeat must be true for 48 samples" in said and "corpus short" in said
    assert newest_checkpoint(world / "runs/runs_out").name == "step_00000003"


def test_validation_reads_every_corpus(world):
    row = next(row for row in rows(world, "adaptive") if "val/loss" in row)
    assert {f"val/{name}/loss" for name in DOMAINS} < row.keys()
    assert row["val/loss"] == pytest.approx(sum(row[f"val/{name}/loss"] for name in DOMAINS) / 3, rel=1e-6)
    assert {f"val/{name}/teacher_loss" for name in DOMAINS} < row.keys()


def test_a_run_goes_on_with_another_seq_len_step_and_blend_and_counts_every_token(world):
    result(world, "other_data")
    by_step = {row["step"]: row for row in rows(world, "other_data") if "data/code/tokens" in row}
    assert by_step[6]["tokens"] == 6 * 256 and by_step[10]["tokens"] == 6 * 256 + 4 * 512
    for row in by_step.values():
        assert sum(row[f"data/{name}/tokens"] for name in DOMAINS) == row["tokens"]
    assert by_step[10]["data/prose/tokens"] == by_step[6]["data/prose/tokens"]
    said = (world / "runs/other_data/log.txt").read_text()
    for sentence in (
        "data.seq_len is 16 instead of 32 from step 6 on", "train.tokens_per_step is 512 instead of 256 from step 6 on",
        "from sample 48 on corpus prose gives 0 of 1000 samples instead of 334",
    ):  # fmt: skip
        assert sentence in said
