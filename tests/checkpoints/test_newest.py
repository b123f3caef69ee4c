"""Where a run resumes is found with few questions to a file server."""

from test_saver import Run, one_rank, saver_of, write  # noqa: F401 - a fixture of this module, too

from ted_scale.base import sealed
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import PROGRESS
from ted_scale.checkpoints.resume import newest_progress


def test_at_a_start_only_rank_0_asks_for_sizes_and_only_of_the_newest_whole_checkpoint(tmp_path, monkeypatch):
    """1,024 ranks asked for 1,024 sizes each, all at once."""
    (tmp_path / "filters").write_bytes(b"filters")
    run, size_of, asked = Run(tmp_path / "run", keep=3), sealed.size_of, []
    saver = saver_of(run, tmp_path / "filters")
    for step in (1000, 2000, 3000):
        assert write(saver, step) is None
    monkeypatch.setattr(sealed, "size_of", lambda path: asked.append((path.parent.name, path.name)) or size_of(path))
    for rank, names in ((0, {PROGRESS, files.FILTERS, "rank_00000.safetensors"}), (1, {PROGRESS})):
        asked.clear()
        monkeypatch.setenv("RANK", str(rank))
        assert newest_progress(run)[1].step == 3000
        assert sorted(asked) == sorted(("step_00003000", name) for name in names)
    (files.checkpoints_of(run.folder) / "step_00003000" / PROGRESS).unlink()
    assert newest_progress(run)[1].step == 2000
