"""The loader's order, blending, masking and spreading over ranks; tokens count upwards, so a token is its own place."""

import time
import tracemalloc
from collections import Counter

import numpy
import pytest
import torch
from corpus import counting_documents, data_section, steps, write_shard
from pydantic import ValidationError

from ted_scale.base.errors import UserError
from ted_scale.config.data import Data
from ted_scale.data import order
from ted_scale.data.blend import cut_of, units
from ted_scale.data.stream import batch, joined, open_stream, validation_batches
from ted_scale.data.stream import cut as cut_for_rank
from ted_scale.kernels.tokens import IGNORED

VOCAB = 60000
LENGTHS = [5, 13, 1, 30, 7, 22, 9, 40, 3, 11] * 4


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """One corpus of two shards, tokens 0 .. 563 in order."""
    folder = tmp_path_factory.mktemp("counting")
    documents = counting_documents(LENGTHS)
    write_shard(folder / "a", documents[:15])
    write_shard(folder / "b", documents[15:])
    return str(folder)


@pytest.fixture(scope="module")
def big_and_small(tmp_path_factory):
    """Two corpora told apart by their tokens: below and above 30000."""
    folder = tmp_path_factory.mktemp("blend")
    big = write_shard(folder / "big", counting_documents([100] * 200))
    return big, write_shard(folder / "small", counting_documents([10] * 20, first=30000))


def taken(stream, *, start=0, count=3, samples_per_step=8, micro_batch=1, world=1):
    """First tokens of the windows of `count` steps, as one list over all ranks for each step."""
    seen = []
    iterators = [
        steps(stream, start=start, samples_per_step=samples_per_step, micro_batch=micro_batch, rank=r, world=world)
        for r in range(world)
    ]
    for _ in range(count):
        # Micro-step first, then rank, then row: the order that the positions are dealt in.
        ranks = [next(iterator) for iterator in iterators]
        seen.append([int(t) for micros in zip(*ranks, strict=True) for m in micros for t in m.tokens_BT[:, 0]])
    return seen


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 1025])
def test_a_permutation_visits_every_index_once_and_differs_by_key(size):
    images = [[order.permute(i, size, key) for i in range(size)] for key in (1, 2)]
    assert sorted(images[0]) == sorted(images[1]) == list(range(size))
    assert size < 7 or (images[0] != images[1] and images[0] != list(range(size)))


def test_the_order_of_every_run_so_far_is_kept():
    assert order.mix(1, 2, 3) == 12174095428247697372
    assert [order.permute(i, 1000, 5) for i in range(5)] == [500, 334, 578, 412, 146]
    assert cut_of(10000, 8, 7, 3) == (8, 1249, 1, 16181764236136305309)


@pytest.mark.parametrize(("tokens", "seq_len"), [(9, 8), (15, 8), (16, 8), (100, 8), (97, 8), (50, 1)])
def test_an_epoch_visits_each_window_once_and_none_runs_past_the_end(tokens, seq_len):
    count = units(tokens, seq_len)
    for epoch in range(20):
        starts = sorted(cut_of(tokens, seq_len, 7, epoch).start(i) for i in range(count))
        assert starts == [starts[0] + i * seq_len for i in range(count)]
        assert starts[0] >= 0 and starts[-1] + seq_len + 1 <= tokens


def test_cuts_and_order_change_from_epoch_to_epoch():
    cuts = [cut_of(1000, 8, 7, epoch) for epoch in range(20)]
    epochs = [[cut.start(i) for i in range(cut.count)] for cut in cuts]
    assert {min(e) for e in epochs} > {0, 3, 5}
    assert len({tuple(s - min(e) for s in e) for e in epochs}) == 20


def test_samples_cross_shards_as_one_stream_of_tokens(two_shards):
    stream = open_stream(data_section(two_shards), 1, VOCAB)
    for position in range(units(564, 8)):
        window = stream.sample(position)
        first, document_starts = window.tokens[0], set(numpy.cumsum([0, *LENGTHS]).tolist())
        assert window.tokens.tolist() == list(range(first, first + 8)) and (window.labels == window.tokens + 1).all()
        assert set(window.begins) == {0} | {i for i, t in enumerate(window.tokens) if int(t) in document_starts}
        assert window.ends.tolist() == [i for i, t in enumerate(window.labels) if int(t) in document_starts]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_samples_of_a_step_do_not_depend_on_ranks_or_accumulation(two_shards, world, micro_batch):
    stream = open_stream(data_section(two_shards), 1, VOCAB)
    assert taken(stream, world=world, micro_batch=micro_batch) == taken(stream, micro_batch=8)


def test_resuming_at_a_position_gives_the_rest_of_the_straight_run(two_shards, big_and_small):
    stream = open_stream(data_section(two_shards, *big_and_small), 1, VOCAB)
    assert taken(stream, start=16, count=4) == taken(stream, count=6)[2:]


def test_another_seed_is_another_order(two_shards):
    data = data_section(two_shards)
    assert taken(open_stream(data, 1, VOCAB)) != taken(open_stream(data, 2, VOCAB))


def test_a_sample_at_position_a_billion_costs_no_more_than_the_first(big_and_small):
    stream = open_stream(data_section(*big_and_small), 1, VOCAB)

    def cost(start):
        tracemalloc.start()
        before = time.perf_counter()
        for position in range(start, start + 200):
            stream.sample(position)
        seconds, peak = time.perf_counter() - before, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return seconds, peak

    near, far = zip(*((cost(0), cost(10**9)) for _ in range(4)), strict=True)
    (near_s, near_bytes), (far_s, far_bytes) = min(near), min(far)  # the least: others may be at work on this machine
    assert far_s < 5 * near_s + 0.05
    assert max(near_bytes, far_bytes) < 100_000


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 2], [999.9, 0.1], [1, 0]])
def test_weights_hold_within_a_thousandth_of_every_block(big_and_small, weights):
    stream = open_stream(data_section(*big_and_small, weights=weights), 1, VOCAB)
    for start in (0, 5000):
        small = sum(int(stream.sample(p).tokens[0]) >= 30000 for p in range(start, start + 1000))
        assert abs(small - 1000 * weights[1] / sum(weights)) <= 1


def test_no_corpus_of_a_blend_repeats_within_an_epoch():
    counts = order.shares([0.7, 0.2, 0.1])
    seen = Counter(order.pick(p, counts, 3) for p in range(5000))
    assert set(seen) == {(c, i) for c, n in enumerate(counts) for i in range(5 * n)} and max(seen.values()) == 1


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -0.5], [float("nan"), 1.0]])
def test_invalid_weights_are_refused(weights):
    with pytest.raises(UserError, match=r"data.corpora.weight must be zero or more and above zero for one corpus"):
        order.shares(weights)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.97])
def test_training_and_validation_share_no_document_and_leave_none_out(two_shards, fraction):
    data = data_section(two_shards, validation=fraction, seq_len=2)
    stream = open_stream(data, 1, VOCAB)
    streams = stream, *stream.held_out.values()
    train, held = (next(iter(stream.parts.values())) for stream in streams)
    assert (train.start, train.stop, held.stop) == (0, held.start, 564)
    assert held.start in numpy.cumsum(LENGTHS)
    assert abs(held.tokens - fraction * 564) <= 20


@pytest.mark.parametrize("lengths", [[30, 970], [1000], [40, 860, 100]], ids=["a long last one", "one", "one inside"])
def test_a_document_is_cut_where_whole_ones_would_take_more_than_twice_the_share(tmp_path, lengths):
    """Two documents of 313 and 402,329 tokens left 313 to train on. What is cut lies in what was held out before."""
    prefix = write_shard(tmp_path / "long", counting_documents(lengths))
    data = data_section(prefix, validation=0.02 if len(lengths) < 3 else 0.06)
    stream = open_stream(data, 1, VOCAB)
    streams = stream, *stream.held_out.values()
    train, held = (next(iter(stream.parts.values())) for stream in streams)
    held_out = {1: 20, 2: 20, 3: 100}[
        len(lengths)
    ]  # the last of three is less than twice what was asked: it stays whole
    assert (train.tokens, held.tokens) == (1000 - held_out, held_out)
    assert streams[1].sample(0).tokens.tolist() == list(range(1000 - held_out, 1008 - held_out))
    read = [streams[0].sample(p).labels.max() for p in range(units(train.tokens, 8))]
    assert max(read) < 1000 - held_out


def test_a_corpus_may_be_held_out_as_a_whole(big_and_small):
    big, small = big_and_small
    corpora = [{"path": big}, {"path": small, "weight": 0, "validation": 1}]
    stream = open_stream(Data(corpora=corpora, seq_len=8), 1, VOCAB)
    (held,) = stream.held_out["small"].parts.values()
    assert ({*stream.parts}, held.start, held.tokens) == ({"big"}, 0, 200)
    with pytest.raises(ValidationError, match=r"weight must be 0 where validation is 1, but is 0\.5"):
        Data(corpora=[corpora[1] | {"weight": 0.5}], seq_len=8)


def test_a_part_shorter_than_a_window_is_refused_by_name(two_shards):
    with pytest.raises(
        UserError, match=r"data.corpora\[0\] .* data.seq_len \+ 1 = 565 tokens or more for train, but leaves 564"
    ):
        open_stream(data_section(two_shards, seq_len=564), 1, VOCAB)
    with pytest.raises(UserError, match="tokens or more for validation, but leaves"):
        open_stream(data_section(two_shards, seq_len=100, validation=0.01), 1, VOCAB)


@pytest.mark.parametrize("attention", ["causal", "document"])
def test_labels_never_cross_a_document_and_positions_restart_where_attention_ends(two_shards, attention):
    stream = open_stream(data_section(two_shards, attention=attention, seq_len=32), 1, VOCAB)
    (micro,) = next(steps(stream, start=0, samples_per_step=16, micro_batch=16, rank=0, world=1))
    document_of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    document, following = document_of[micro.tokens_BT], document_of[micro.tokens_BT + 1]
    crosses = document != following
    assert crosses.any() and not crosses.all()
    assert micro.labels_BT[crosses].eq(IGNORED).all() and micro.weights_BT[crosses].eq(0).all()
    assert (
        torch.equal(micro.labels_BT[~crosses], micro.tokens_BT[~crosses] + 1) and micro.weights_BT[~crosses].eq(1).all()
    )
    assert micro.weights_BT.dtype == torch.float32
    if attention == "causal":
        assert micro.packing is None
        return
    for row, positions in zip(document.tolist(), micro.packing.positions_BT.tolist(), strict=True):
        assert positions == [row[:i].count(d) for i, d in enumerate(row)]


@pytest.mark.parametrize(("world", "shared"), [(1, 1), (2, 1), (3, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("tokens", [40, 64, 10**9])
def test_validation_counts_each_window_once_for_any_number_of_ranks(two_shards, world, shared, tokens):
    (stream,) = open_stream(data_section(two_shards, validation=0.3), 1, VOCAB).held_out.values()
    ranks = [
        list(
            validation_batches(
                stream, tokens=tokens, micro_batch=2, rank=r, world=world, sequence_parallel=shared, device="cpu"
            )
        )
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    labels = torch.cat([b.labels_BT[b.weights_BT == 1] for batches in ranks for b in batches])
    padding = [b for batches in ranks for b in batches if not b.weights_BT.any()]
    assert all(b.labels_BT.eq(IGNORED).all() for b in padding)
    windows = min(-(-tokens // 8), stream.count)
    first = next(iter(stream.parts.values())).start
    begins = set(numpy.cumsum(LENGTHS).tolist())
    assert sorted(labels.tolist()) == [t for t in range(first + 1, first + 1 + windows * 8) if t not in begins]


@pytest.mark.parametrize("attention", ["causal", "document"])
def test_ranks_that_share_rows_have_the_tokens_labels_and_positions_of_whole_rows(two_shards, attention):
    """Labels, too, of the last token of a piece: those are made of whole rows."""
    stream = open_stream(data_section(two_shards, attention=attention), 1, VOCAB)
    both = [batch(stream, [3, 4]), batch(stream, [5, 6])]
    pieces = [joined([cut_for_rank(whole, rank, 4) for whole in both]) for rank in range(4)]
    whole = joined(both)
    for name in ("tokens_BT", "labels_BT", "weights_BT"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces], dim=1), getattr(whole, name))
    positions = whole.packing.positions_BT if whole.packing else torch.arange(8).expand(4, 8)
    assert torch.equal(torch.cat([piece.share.positions_BT for piece in pieces], dim=1), positions)
    assert [(piece.share.index, piece.share.of) for piece in pieces] == [(rank, 4) for rank in range(4)]
    assert all((piece.packing is None) == (attention == "causal") for piece in pieces)
    assert all(piece.packing is None or piece.packing.lengths == whole.packing.lengths for piece in pieces)


def test_the_order_of_samples_depends_on_the_ranks_that_read_different_text(two_shards):
    """Four ranks, two to a row, read as two ranks do; each has half of every row."""
    stream = open_stream(data_section(two_shards), 1, VOCAB)
    wanted = {"start": 8, "stop": 24, "samples_per_step": 8, "micro_batch": 2}
    whole = [list(steps(stream, **wanted, rank=r, world=2)) for r in range(2)]
    shared = [list(steps(stream, **wanted, rank=r, world=4, sequence_parallel=2)) for r in range(4)]
    for reader in range(2):
        for of_whole, *of_pieces in zip(whole[reader], shared[2 * reader], shared[2 * reader + 1], strict=True):
            for micro, *pieces in zip(of_whole, *of_pieces, strict=True):
                assert torch.equal(torch.cat([p.tokens_BT for p in pieces], dim=1), micro.tokens_BT)


def test_rows_that_do_not_divide_over_their_ranks_are_refused(two_shards):
    with pytest.raises(
        ValueError, match=r"sequence_parallel must divide data.seq_len \(8\), but is 3; change one of them"
    ):
        data_section(two_shards, sequence_parallel=3)


def test_a_path_without_a_last_part_needs_a_name():
    with pytest.raises(ValueError, match=r"corpora.name must be set where the path ends in none"):
        data_section(".")


def test_a_token_outside_the_vocabulary_is_named_with_its_corpus_and_shard(tmp_path):
    prefix = write_shard(tmp_path / "far", [[1, 2, 300, 4, 5, 6, 7, 8, 9]])
    stream = open_stream(data_section(prefix), 1, 300)
    with pytest.raises(UserError) as error:
        next(steps(stream, start=0, samples_per_step=1, micro_batch=1, rank=0, world=1))
    assert f"corpus shard {prefix} of data.corpora[0] ({prefix}) must hold token ids in 0..299" in str(error.value)
    assert "but holds 300" in str(error.value)


def test_a_negative_token_is_refused(tmp_path):
    prefix = write_shard(tmp_path / "negative", [[1, 2, -3, 4, 5, 6, 7, 8, 9]], dtype=numpy.int32)
    with pytest.raises(UserError, match="but holds -3"):
        open_stream(data_section(prefix), 1, 300).sample(0)


def test_samples_that_do_not_divide_over_ranks_are_refused(two_shards):
    stream = open_stream(data_section(two_shards), 1, VOCAB)
    with pytest.raises(UserError, match=r"must be a multiple of train.micro_batch x ranks = 6, but is 8"):
        steps(stream, start=0, samples_per_step=8, micro_batch=2, rank=0, world=3)
