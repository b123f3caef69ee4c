"""Who serves the store in which the ranks meet."""

from pathlib import Path

import pytest
import torch.distributed as dist

from ted_scale.ranks import store


@pytest.mark.parametrize(
    ("rank", "agent", "serves"), [(0, None, True), (1, None, False), (0, "True", False), (0, "False", True)]
)
def test_rank_0_serves_the_store_unless_torchrun_does(monkeypatch, rank, agent, serves):
    """A second server at torchrun's port failed to bind, and each start printed that as an error."""
    asked = []
    monkeypatch.setattr(dist, "TCPStore", lambda *arguments, **_: asked.append(arguments))
    monkeypatch.setattr(dist, "PrefixStore", lambda *_: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if agent:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    store.open_store(rank, 2, Path("run"))
    assert asked == [("127.0.0.1", 29999, 2, serves)]
