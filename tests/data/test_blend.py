"""Where a run stands in its corpora: nothing comes twice or never, whatever changes on the way."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from corpus import counting_documents, data_section, steps, write_shard
from tiny import make_run

from ted_scale.base.errors import UserError
from ted_scale.checkpoints.progress import Progress
from ted_scale.data import blend, order
from ted_scale.data.blend import Cursor, Domain
from ted_scale.data.stream import open_stream, refuse_repetition
from ted_scale.distill.stages import stages_of
from ted_scale.feed import open_feed
from ted_scale.kernels.tokens import IGNORED
from ted_scale.metrics.metrics import Metrics

A, B, C = Domain("a", 1000), Domain("b", 77), Domain("c", 3000)
VOCAB = 60000


def read(interval, positions) -> Counter:
    """How often each (domain, epoch, token) is read at some positions."""
    seen = Counter()
    for position in positions:
        which, cursor = interval.at(position)
        for first, length in interval.pieces(which, cursor):
            seen.update((interval.domains[which].name, cursor.epoch, first + i) for i in range(length))
    return seen


def whole_epochs(seen: Counter, domain: Domain) -> list[set[int]]:
    """The tokens of each epoch of a domain, the last left out, for it may not be over."""
    epochs = sorted({epoch for name, epoch, _ in seen if name == domain.name})
    return [{t for name, e, t in seen if (name, e) == (domain.name, epoch)} for epoch in epochs[:-1]]


@pytest.mark.parametrize("seed", range(5))
def test_every_token_of_an_epoch_is_read_once_for_any_changes_of_seq_len(seed):
    draw = random.Random(seed)
    interval, position, seen = blend.begin([A, B], order.shares([0.8, 0.2]), 8, seed), 0, Counter()
    for _ in range(12):
        count = draw.randrange(1, 120)
        seen += read(interval, range(position, position + count))
        position += count
        shares = order.shares([draw.random(), draw.random()])
        interval = blend.follow(interval, position, [A, B], shares, draw.choice([3, 8, 16, 20, 50]))
    assert max(seen.values()) == 1
    for domain in (A, B):
        epochs = whole_epochs(seen, domain)
        assert epochs and all(tokens == set(range(min(tokens), max(tokens) + 1)) for tokens in epochs)
        assert all(
            domain.tokens - len(tokens) < 2 * 50 for tokens in epochs
        )  # the ends that an epoch's cut leaves over


def test_cursors_count_what_the_samples_before_them_read():
    interval = blend.begin([A, B, C], order.shares([0.5, 0.2, 0.3]), 8, 3)
    interval = blend.follow(interval, 333, [A, B, C], order.shares([1, 1, 1]), 12)
    start = Counter({d.name: c.seen for d, c in zip(interval.domains, interval.cursors, strict=True)})
    for count in (0, 1, 7, 999, 1000, 2345):
        read_by = start + Counter(
            name for (name, *_), n in read(interval, range(333, 333 + count)).items() for _ in range(n)
        )
        cursors = interval.cursors_at(333 + count)
        assert {d.name: c.seen for d, c in zip(interval.domains, cursors, strict=True)} == dict(read_by)


def test_a_blend_that_did_not_change_is_the_same_interval():
    interval = blend.begin([A, B], order.shares([1, 1]), 8, 0)
    assert blend.follow(interval, 500, [A, B], order.shares([1, 1]), 8) is interval
    assert blend.follow(interval, 500, [B, A], order.shares([1, 1]), 8) is interval
    assert blend.changes(interval, interval) == []


def test_corpora_may_be_added_removed_and_added_again():
    first = blend.begin([A, B], order.shares([1, 1]), 8, 0)
    at_500 = first.cursors_at(500)
    second = blend.follow(first, 500, [A, C], order.shares([1, 1]), 8)
    assert [d.name for d in second.domains] == ["a", "c", "b"] and second.shares == (500, 500, 0)
    assert second.cursors == (at_500[0], Cursor(0, 8, 0, 0), at_500[1])
    third = blend.follow(second, 700, [B], order.shares([1]), 8)
    assert third.domains[0] == B and third.cursors[0] == at_500[1] and third.at(700)[1] == at_500[1]
    assert blend.changes(first, second) == [
        "from sample 500 on corpus c gives 500 of 1000 samples instead of 0",
        "from sample 500 on corpus b gives 0 of 1000 samples instead of 500",
    ]


def test_a_corpus_that_grew_begins_its_next_epoch_and_the_change_is_reported():
    first = blend.begin([A], order.shares([1]), 8, 0)
    second = blend.follow(first, 50, [Domain("a", 2000)], order.shares([1]), 8)
    assert second.cursors == (Cursor(1, 8, 0, 400),)
    (sentence,) = blend.changes(first, second)
    assert sentence == (
        "from sample 50 on corpus a holds other text to train on, 2000 tokens instead of 1000: its epoch 0 is left after 400 "
        "tokens and the next one begins"
    )


def test_the_record_of_an_interval_is_small_and_is_restored_from_json():
    interval = blend.begin([A, B], order.shares([1, 3]), 8, 0)
    interval = blend.follow(interval, 10**9, [A, B], order.shares([1, 1]), 16)
    text = json.dumps(blend.as_record(interval))
    assert len(text) < 500 and blend.from_record(json.loads(text)) == interval


def test_weights_by_temperature():
    assert blend.weights_of("static", 2.0, [3, 1], [10, 10]) == [3, 1]
    assert blend.weights_of("temperature", 1.0, [1, 2, 0], [400, 100, 7]) == [1.0, 0.5, 0.0]
    assert blend.weights_of("temperature", 2.0, [1, 1], [400, 100]) == [1.0, 0.5]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    big = write_shard(folder / "big", counting_documents([10] * 100))
    return big, write_shard(folder / "small", counting_documents([5] * 40, first=30000))


def test_a_window_of_pieces_has_the_right_labels_and_positions_restart_at_a_piece(two):
    before = open_stream(data_section(two[0], seq_len=8), 1, VOCAB).interval
    stream = open_stream(data_section(two[0], seq_len=20), 1, VOCAB, before, 10)
    window = stream.sample(10)
    assert (window.labels == window.tokens + 1).all()
    jumps = [i for i in range(1, 20) if window.tokens[i] != window.tokens[i - 1] + 1]
    assert set(jumps) <= {8, 16} and jumps and set(jumps) <= set(window.begins)


def test_the_last_window_of_an_epoch_with_another_unit_is_padded(two):
    before = open_stream(data_section(two[0], seq_len=8), 1, VOCAB).interval  # 124 units of 8 tokens: 992
    stream = open_stream(data_section(two[0], seq_len=100), 1, VOCAB, before, 4)
    windows = [stream.sample(4 + i) for i in range(11)]
    assert [int((w.labels != IGNORED).sum()) for w in windows] == [100] * 9 + [60, 100]
    assert stream.interval.cursors_at(14)[0] == Cursor(1, 100, 0, 992)


def hashes(two, world: int, workers_start: int, stop: int, before=None) -> list[int]:
    stream = open_stream(data_section(*two, seq_len=8), 1, VOCAB, before, workers_start)
    ranks = [
        steps(stream, start=workers_start, samples_per_step=8, micro_batch=1, rank=r, world=world) for r in range(world)
    ]
    seen = []
    for _ in range((stop - workers_start) // 8):
        step = [next(rank) for rank in ranks]
        seen += [micro.tokens_BT[0].tolist() for micros in zip(*step, strict=True) for micro in micros]
    return seen


@pytest.mark.parametrize("worlds", [(1, 1), (2, 8), (4, 2), (8, 1)], ids=str)
def test_samples_do_not_change_when_the_number_of_ranks_changes(two, worlds):
    before = blend.from_record(blend.as_record(open_stream(data_section(*two), 1, VOCAB).interval))
    straight = hashes(two, 1, 0, 64)
    assert hashes(two, worlds[0], 0, 24) + hashes(two, worlds[1], 24, 64, before) == straight


def test_a_corpus_that_must_not_repeat_is_refused_if_it_would(two):
    data = data_section(*two, seq_len=8)
    corpora = [corpus.model_copy(update={"repeat": False}) for corpus in data.corpora]
    data = data.model_copy(update={"corpora": corpora})
    stream = open_stream(data, 1, VOCAB)  # small holds 24 units of 8 tokens and gives half of the samples
    used_up = max(n for n in range(200) if stream.interval.cursors_at(n)[1].seen <= 192)
    refuse_repetition(data, stream, used_up)
    with pytest.raises(
        UserError, match=r"data.corpora\[1\].repeat must be true for 80 samples of 8 tokens, but is false"
    ):
        refuse_repetition(data, stream, 80)


def test_two_corpora_of_one_name_are_refused(two):
    with pytest.raises(ValueError, match=r"corpora.name must be another for every corpus, but 'big' is there twice"):
        data_section(two[0], two[0])


def test_metrics_count_what_was_read_of_each_corpus(two, tmp_path):
    import torch

    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    numbers = Metrics(run, writes=True, total_steps=9, step=0, device=torch.device("cpu"), wandb_run=None)
    numbers.reads(open_stream(data_section(*two, seq_len=8, weights=[0.75, 0.25]), 1, VOCAB))
    row = numbers.read_of_corpora(1000)
    numbers.close()
    assert row == {
        "data/big/epoch": 6, "data/big/epoch_tokens": 6000 - 6 * 992, "data/big/tokens": 6000,
        "data/small/epoch": 10, "data/small/epoch_tokens": 2000 - 10 * 192, "data/small/tokens": 2000,
    }  # fmt: skip


def test_a_corpus_that_left_may_be_smaller_than_a_window_of_the_new_seq_len():
    first = blend.begin([A, B], order.shares([999, 1]), 8, 1)
    second = blend.follow(first, 1, [A], order.shares([1]), 256)
    assert second.cursors_at(1000)[1] == Cursor(0, 256, 0, 0)
    third = blend.follow(second, 1000, [A, B], order.shares([1, 1]), 8)
    assert third.cursors_at(1000)[1].seen == 0


def test_other_shards_of_the_same_size_are_other_text(tmp_path):
    def opened(*names, before=None):
        folder = tmp_path / "corpus"
        for number, name in enumerate(names):
            write_shard(folder / name, counting_documents([100] * (3 + number)))
        stream = open_stream(data_section(str(folder), seq_len=8), 1, VOCAB, before, 10)
        for name in names:
            for path in folder.glob(f"{name}.*"):
                path.unlink()
        return stream.interval

    first = opened("x-00001", "x-00002")
    assert opened("x-00001", "x-00002", before=first) is first
    swapped = opened("x-00002", "x-00001", before=first)
    assert swapped is not first and "holds other text" in blend.changes(first, swapped)[0]


def test_another_hold_out_is_reported_within_a_stage_and_between_two(tmp_path):
    """What a checkpoint knows of a corpus is the part that it trains on, so a border that moved is other text."""
    write_shard(tmp_path / "corpus", counting_documents([100] * 20))
    first, second = make_run(tmp_path), make_run(tmp_path, data={"corpora": [{"path": str(tmp_path / "corpus")}]})
    stages = stages_of(first)
    _, stands, _ = open_feed(first, stages[0], Progress(), VOCAB)
    for stage, step, begins in ((stages[0], 2, "from sample 16 on"), (stages[1], 4, "from this stage on")):
        at = replace(stands, step=step, samples=8 * step)
        assert open_feed(first, stage, at, VOCAB)[2] == []
        (said,) = open_feed(second, stage, at, VOCAB)[2]
        assert said.startswith(f"{begins} corpus corpus holds other text to train on, 2000 tokens instead of 1800")


def test_a_share_that_is_rounded_up_is_valid():
    assert all(type(share) is int for share in order.shares([1e6, 1]))


@pytest.mark.parametrize("temperature", [0.01, 1e-3, 1e4])
def test_extreme_temperatures_give_valid_weights(temperature):
    weights = blend.weights_of("temperature", temperature, [1.0, 0.0, 2.0], [10**12, 10**9, 10**12])
    assert max(weights) == 1.0 and weights[1] == 0.0 and weights[0] == pytest.approx(0.5 ** (1 / temperature))
