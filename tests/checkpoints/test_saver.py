"""Saves in the background. Whichever call fails: the failure is reported, and the run can still resume."""

import errno
import itertools
import logging
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from damages import DAMAGES, copy_run, mix_up
from states import state_of, whole

from ted_scale.base import durable, sealed
from ted_scale.base.errors import Gone, UserError
from ted_scale.checkpoints import attempts, holder
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import saver as saving
from ted_scale.checkpoints.filters_file import save_filters
from ted_scale.checkpoints.progress import Progress
from ted_scale.checkpoints.saver import Save, Saver
from ted_scale.checkpoints.state import KINDS, Part, Snapshot, State, cut, key_of, rank_file
from ted_scale.config.operation import Checkpoint
from ted_scale.ranks import agree
from ted_scale.run_folder import resume_point
from ted_scale.storage.tensor_file import as_bytes

log = logging.getLogger("ted_scale")
WRITES = ("open", "write", "fsync", "rename", "mkdir", "link", "unlink", "rmdir")


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    def __init__(self, folder: Path, **settings):
        self.folder, self.name, self.checkpoint = folder, folder.name, Checkpoint(**{"keep": 1, **settings})


def saver_of(run: Run, filters: Path) -> Saver:
    return Saver(run, [filters], lambda title, text: log.error(text))


def state(step: int) -> Snapshot:
    tensors = {key_of(kind, "w"): torch.full((50,), float(step)) for kind in ("fp32", "exp_avg", "exp_avg_sq")}
    return Snapshot(tensors, {"ranks": 1, "updates": step, "shapes": {"w": [5, 10]}})


def write(saver: Saver, step: int) -> str | None:
    place = files.checkpoints_of(saver.folder) / files.checkpoint_name(step)
    saver.begin(Save(place, state(step), Progress(step, step, step), True))
    saver.wait()
    return saver.outcome.failure and saver.outcome.failure.reason


def content(checkpoint: Path) -> float:
    assert files.check_digests(checkpoint) is None
    return whole(state_of(checkpoint), "w").unique().item()


def failing(monkeypatch, number: int, code: int, for_good: bool):
    """The `number`-th call that changes the disk fails, and all later ones if `for_good`. Counts the calls."""
    calls = itertools.count(1)

    def wrapped(original):
        opens = original is os.open

        def call(*arguments, **named):
            if opens and not arguments[1] & os.O_CREAT:
                return original(*arguments, **named)
            mine = next(calls)
            if mine == number or (for_good and mine > number):
                raise OSError(code, os.strerror(code))
            return original(*arguments, **named)

        return call

    for name in WRITES:
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    return calls


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_whichever_write_fails_a_whole_checkpoint_is_left_and_the_next_save_works(
    tmp_path, monkeypatch, code, for_good
):
    monkeypatch.setattr(attempts, "PAUSES_S", (0, 0))
    filters = tmp_path / "filters.safetensors"
    filters.write_bytes(b"filters")
    failed = published = 0
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        saver = saver_of(Run(folder), filters)
        assert write(saver, 4) is None
        with monkeypatch.context() as patch:
            calls = failing(patch, number, code, for_good)
            failure = write(saver, 8)
        made = next(calls) - 1
        found = {s.step: content(s.path) for s in files.published(folder) if s.fault is None}
        assert found, f"call {number}: nothing is left to go on from"
        assert all(step == value for step, value in found.items())
        assert failure or 8 in found
        failed, published = failed + bool(failure), published + (8 in found)
        files.clear_unfinished(folder)  # as a restart does
        assert write(saver, 12) is None
        assert [s.step for s in files.published(folder)] == [12]
        shutil.rmtree(folder)
        if made < number:
            break
    assert number > 15
    assert published > 1
    assert failed > 5 or not (for_good or code == errno.ENOSPC)  # a single error is retried


def test_a_process_that_another_start_has_replaced_publishes_nothing_more(tmp_path, monkeypatch):
    (tmp_path / "filters").write_bytes(b"filters")
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    holder.take(run.folder)
    saver = saver_of(run, tmp_path / "filters")
    assert write(saver, 4) is None
    number, mine = holder.held[run.folder]
    holder.make(holder.path_of(run.folder, number + 1), mine._replace(host="node7", pid=12, token="other"))
    failure = write(saver, 8)
    assert failure and "process 12 on node7 has taken" in failure
    assert [path.name for path in files.checkpoints_of(run.folder).iterdir()] == ["step_00000004"]
    del holder.held[run.folder]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_whichever_write_fails_a_step_that_is_saved_again_is_never_lost(tmp_path, monkeypatch, code):
    """As after a rewind: the step has a whole checkpoint already, and gets another."""
    monkeypatch.setattr(attempts, "PAUSES_S", (0, 0))
    (tmp_path / "filters").write_bytes(b"filters")
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        saver = saver_of(Run(folder), tmp_path / "filters")
        assert write(saver, 8) is None
        with monkeypatch.context() as patch:
            calls = failing(patch, number, code, True)
            write(saver, 8)
        made = next(calls) - 1
        files.clear_unfinished(folder)
        assert [(s.step, content(s.path)) for s in files.published(folder)] == [(8, 8)], f"call {number}"
        if made < number:
            break
    assert number > 15


def test_a_failed_save_does_not_end_the_run_but_the_last_one_must_not_fail(tmp_path, monkeypatch, caplog):
    saver = saver_of(Run(tmp_path), tmp_path / "filters")
    (tmp_path / "filters").write_bytes(b"filters")
    with monkeypatch.context() as patch:
        failing(patch, 1, errno.ENOSPC, True)
        assert write(saver, 4)
    assert "rank 0 could not write step_00000004: No space left on device" in caplog.text
    assert "; the run stops after more than 3 such failures in a row" in caplog.text
    monkeypatch.setattr(saving, "LAST_PAUSES_S", (0, 0))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="could not write step_00000004"):
        failing(patch, 1, errno.ENOSPC, True)
        saver.finish()
    saver.finish()  # there is room again
    assert content(files.newest_checkpoint(tmp_path)) == 4
    with monkeypatch.context() as patch:
        failing(patch, 1, errno.EIO, True)
        monkeypatch.setattr(attempts, "PAUSES_S", ())
        assert write(saver, 8)
        with pytest.raises(
            Gone, match="must be a folder that all ranks can write, but rank 0 could not write step_00000008"
        ):
            saver.finish()


def test_200_damages_are_all_noticed_and_the_checkpoint_before_is_used(tmp_path, caplog):
    """With the function that a run resumes with. The first and the third checkpoint share the file of the filters."""
    (tmp_path / "filters").write_bytes(random.Random(0).randbytes(500))
    saver, seen = saver_of(Run(tmp_path / "original", keep_every=1), tmp_path / "filters"), set()
    for step in (4, 8, 12):
        assert write(saver, step) is None
    for case in range(200):
        run, rng = Run(copy_run(tmp_path / "original", tmp_path / str(case))), random.Random(case)
        newest = files.checkpoints_of(run.folder) / "step_00000012"
        damage = DAMAGES[case % len(DAMAGES)]
        same_in_all = files.FILTERS if damage is mix_up else None
        victim = rng.choice(sorted(p for p in newest.iterdir() if p.name != same_in_all))
        damage(victim, rng)
        seen.add((damage.__name__, victim.name))
        caplog.clear()
        found, line = resume_point(run)
        assert (found.name, line) == ("step_00000008", 1), (case, damage, victim)
        (warned,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert warned.startswith(f"checkpoint {newest} is damaged and skipped: ")
    assert len(seen) == len(DAMAGES) * 4 - 1


def test_one_stale_handle_at_a_resume_takes_no_checkpoint_away(tmp_path, monkeypatch, caplog):
    """Damage would mean: back to the checkpoint before, on a new line, whose first save prunes the good newer one."""
    (tmp_path / "filters").write_bytes(b"filters")
    run, digest, left = Run(tmp_path / "run", keep=2), sealed.digest_of, [1]
    saver = saver_of(run, tmp_path / "filters")
    assert write(saver, 1000) is None and write(saver, 2000) is None

    def stale(path):
        if left and not left.clear():
            raise OSError(errno.ESTALE, "Stale file handle")
        return digest(path)

    monkeypatch.setattr(sealed, "digest_of", stale)
    assert resume_point(run) == (files.checkpoints_of(run.folder) / "step_00002000", 0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_all_ranks_reach_one_verdict_whatever_each_of_them_meets(monkeypatch):
    """Two ranks as threads, which meet in the gather as processes do: none is left there alone."""
    meeting, met = threading.Barrier(2, timeout=5), {}

    def gather(mine, group=None):
        met[threading.current_thread().name] = mine
        meeting.wait()
        everyone = [met["0"], met["1"]]
        meeting.wait()
        return everyone

    monkeypatch.setattr(agree, "gather", gather)

    def look(found):
        if isinstance(found, Exception):
            raise found
        return found

    def verdict(found, into):
        try:
            into.append(agree.verdict(look, found))
        except Gone as error:
            into.append(str(error))

    for of_0, of_1, expected in (
        (None, None, None), (None, Gone("away"), "away"), (Gone("away"), None, "away"), (Gone("away"), "broken", "broken"),
        ("broken", None, "broken"), (Gone("one"), Gone("two"), "one"),
    ):  # fmt: skip
        said = []
        ranks = [threading.Thread(target=verdict, args=(f, said), name=str(k)) for k, f in enumerate((of_0, of_1))]
        [rank.start() for rank in ranks], [rank.join() for rank in ranks]
        assert said == [expected] * 2


def test_a_checkpoint_with_a_missing_file_is_not_published(tmp_path):
    part = files.checkpoints_of(tmp_path) / "step_00000004.part"
    part.mkdir(parents=True)
    entries = {name: durable.write_file(part / name, [b"1234"]) for name in ("a", "b")}
    (part / "b").unlink()
    with pytest.raises(sealed.Damaged, match="b is missing"):
        saving.seal_and_publish(part, [entries], Save(tmp_path, state(4), Progress(4), False))
    assert not files.published(tmp_path)


def test_new_filters_of_stage_i_are_in_every_later_checkpoint(tmp_path):
    """A run that resumes with a longer stage I has an earlier checkpoint with the filters of the shorter one."""
    (tmp_path / "old").write_bytes(b"old filters")
    (tmp_path / "new").write_bytes(b"new filters")
    saver = saver_of(Run(tmp_path, keep_every=1), tmp_path / "old")
    assert write(saver, 4) is None
    saver.use_filters(tmp_path / "new")
    for step in (8, 9, 10):
        assert write(saver, step) is None
    held = [(s.path / files.FILTERS).read_bytes() for s in files.published(tmp_path)]
    assert held == [b"new filters"] * 3 + [b"old filters"]
    assert saver.filters_file.read_bytes() == b"new filters"


def test_filters_that_are_damaged_in_the_last_checkpoint_are_read_from_another_file(tmp_path):
    (tmp_path / "filters").write_bytes(b"filters")
    saver = saver_of(Run(tmp_path), tmp_path / "filters")
    assert write(saver, 1) is None
    (files.checkpoints_of(tmp_path) / "step_00000001" / files.FILTERS).write_bytes(b"flitres")
    assert write(saver, 2) is None
    assert (files.newest_checkpoint(tmp_path) / files.FILTERS).read_bytes() == b"filters"


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, UserError), (errno.EIO, Gone)], ids=["full", "broken"])
def test_an_error_while_stage_i_s_filters_are_written_is_one_sentence_and_keeps_the_earlier_file(
    tmp_path, monkeypatch, code, error
):
    path, tensors = tmp_path / files.FILTERS, {"w": torch.ones(3)}
    monkeypatch.setattr(attempts, "PAUSES_S", (0, 0))
    save_filters(path, tensors, {})
    before = path.read_bytes()
    for number in range(1, 6):
        with monkeypatch.context() as patch, pytest.raises(error, match=r"0 could not write filters\.safetensors"):
            failing(patch, number, code, True)
            save_filters(path, tensors, {})
        assert path.read_bytes() == before
    save_filters(path, tensors, {})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_two_checkpoints_never_share_a_filters_file_and_older_ones_do(tmp_path, keep):
    """One bad block must not damage all checkpoints, and not every checkpoint needs its own gigabyte of filters."""
    (tmp_path / "filters").write_bytes(b"filters")
    saver = saver_of(Run(tmp_path), tmp_path / "filters")
    saver.settings = saver.settings.model_copy(update={"keep": keep})
    for step in range(1, 7):
        assert write(saver, step) is None
        inodes = [(s.path / files.FILTERS).stat().st_ino for s in files.published(tmp_path)]
        assert len(inodes) == min(step, keep)
        assert len(set(inodes)) == min(len(inodes), 2)
        assert (tmp_path / "filters").stat().st_ino not in inodes


def test_a_stale_hard_link_in_a_part_folder_is_not_written_through(tmp_path):
    (tmp_path / "filters").write_bytes(b"filters")
    saver = saver_of(Run(tmp_path), tmp_path / "filters")
    assert write(saver, 1) is None
    stale = files.checkpoints_of(tmp_path) / "step_00000002.part"
    stale.mkdir()
    os.link(files.checkpoints_of(tmp_path) / "step_00000001" / files.FILTERS, stale / files.FILTERS)
    saver.settings = saver.settings.model_copy(update={"keep": 5})
    assert write(saver, 2) is None
    assert [content(s.path) for s in files.published(tmp_path)] == [2, 1]


def test_a_save_works_after_a_user_has_removed_all_checkpoints(tmp_path):
    (tmp_path / "filters").write_bytes(b"filters")
    saver = saver_of(Run(tmp_path, keep_every=1), tmp_path / "filters")
    for step in (1, 2, 3):
        assert write(saver, step) is None
    shutil.rmtree(files.checkpoints_of(tmp_path))
    assert write(saver, 4) is None
    assert content(files.newest_checkpoint(tmp_path)) == 4


def test_a_step_waits_only_for_the_copy_to_memory_and_the_next_save_waits_for_the_write(tmp_path, monkeypatch):
    """With a slow disk."""
    (tmp_path / "filters").write_bytes(b"filters")
    saver, free = saver_of(Run(tmp_path), tmp_path / "filters"), threading.Event()
    write_file = durable.write_file

    def slowly(*arguments):
        assert free.wait(20)
        return write_file(*arguments)

    monkeypatch.setattr(durable, "write_file", slowly)
    monkeypatch.setattr(saving.state, "kept_buffers", lambda engine: None)
    monkeypatch.setattr(saving.state, "snapshot", lambda engine, buffers: state(4))
    row = saver.save("engine", Progress(4, 4, 4), with_filters=True)
    assert not files.published(tmp_path) and row.keys() == {"checkpoint/stall_ms"} and row["checkpoint/stall_ms"] < 5000
    timer = threading.Timer(0.2, free.set)
    timer.start()
    row = saver.save("engine", Progress(8, 8, 8), with_filters=True)
    assert row["checkpoint/write_ms"] > 150 and row["checkpoint/stall_ms"] > 150 and row["checkpoint/failed"] == 0
    saver.finish()
    assert [s.step for s in files.published(tmp_path)] == [8]


SHAPES = {"large": [7, 11], "small": [2], "one": [1]}  # more and fewer elements than ranks


def state_written_by(folder: Path, ranks: int, shapes: dict) -> tuple[State, dict[str, torch.Tensor]]:
    """(a checkpoint, the tensors that are in it)"""
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for rank in range(ranks):
        places = {name: cut(tensor.numel(), ranks, rank) for name, tensor in tensors.items()}
        pieces = {key_of("fp32", n): tensors[n].flatten()[a:b] for n, (a, b) in places.items() if b > a}
        durable.write_file(folder / rank_file(rank), as_bytes(pieces))
    return State(folder, {"ranks": ranks, "updates": 0, "shapes": shapes}), tensors


@pytest.mark.parametrize(("before", "after"), [(4, 3), (3, 4), (1, 5), (5, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, before, after, dtype):
    """Every part that one of `after` ranks holds, also into memory of another kind, which is filled through the host's."""
    read, tensors = state_written_by(tmp_path, before, SHAPES)
    for name, tensor in tensors.items():
        assert torch.equal(whole(read, name), tensor)
    for rank in range(after):
        held = {name: cut(tensor.numel(), after, rank) for name, tensor in tensors.items()}
        parts = [Part("fp32", name, a, torch.full((b - a,), -1, dtype=dtype)) for name, (a, b) in held.items()]
        read.fill(parts)
        assert all(torch.equal(p.target, tensors[p.name].flatten()[slice(*held[p.name])].to(dtype)) for p in parts)


def test_a_rank_among_fewer_opens_each_file_once_and_reads_only_what_it_holds(tmp_path, monkeypatch):
    """Rank 1 of 2 reads what 200 wrote: from more files than may be open at once."""
    state, tensors = state_written_by(tmp_path, 200, {"a": [30, 40], "b": [1200]})
    opened, counts, opening, reading = [], [], os.open, os.preadv

    def open_file(path, *arguments):
        opened.append((Path(path).name, opening(path, *arguments)))
        return opened[-1][1]

    def read_some(descriptor, buffers, begin):
        counts.append(reading(descriptor, buffers, begin))
        return counts[-1]

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read_some)
    parts = [Part("fp32", name, 600, torch.empty(600)) for name in tensors]
    state.fill(parts)
    names = [rank_file(rank) for rank in range(100, 200)]
    assert [name for name, _ in opened] == names
    assert len({descriptor for _, descriptor in opened}) == 1  # each was closed before the next
    assert sum(counts) == sum((tmp_path / name).stat().st_size for name in names)  # all of it, once
    assert all(torch.equal(part.target, tensors[part.name].flatten()[600:]) for part in parts)


def test_pieces_side_by_side_are_read_by_one_call(tmp_path, monkeypatch):
    pieces = {key_of(kind, name): torch.randn(5) for name in ("a", "b") for kind in KINDS}
    durable.write_file(tmp_path / rank_file(0), as_bytes(pieces))
    read = State(tmp_path, {"ranks": 1, "updates": 0, "shapes": {"a": [5], "b": [5]}})
    parts = [Part(kind, name, 0, torch.empty(5)) for kind in KINDS for name in ("b", "a")]
    calls, reading = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(arguments) or reading(*arguments))
    read.fill(parts)
    assert len(calls) == 3  # the header's length, the header, and all pieces
    assert all(torch.equal(part.target, pieces[key_of(part.kind, part.name)]) for part in parts)
