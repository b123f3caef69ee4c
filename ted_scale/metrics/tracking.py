"""Weights & Biases: one W&B run for a run of ours, with the same id after every resume, and without secrets."""

import contextlib
import logging
import os
import subprocess
from pathlib import Path

from ted_scale.base import redact
from ted_scale.config.run import Run

log = logging.getLogger("ted_scale")
# Neither the end of a run nor the message of a fault may wait for the network for ever. `wandb sync` uploads the rest.
LAST_UPLOAD = {"finish_timeout": 30, "finish_timeout_raises": True}


def open_wandb(run: Run, run_id: str | None):
    """Open the W&B run, or resume it by its id. Without a key it is offline, and the log shows the command that uploads it."""
    if run.wandb is None:
        return None
    import wandb

    settings = run.wandb
    online = settings.mode == "online" or (settings.mode == "auto" and has_key())
    with redact.out_of_the_environment("SLURM"):  # W&B uploads every variable of Slurm, and SLURM_JWT is a key
        wandb_run = wandb.init(
            project=settings.project, entity=settings.entity, group=settings.group, name=run.name, id=run_id,
            tags=settings.tags, notes=settings.notes, dir=str(run.folder), config=run.model_dump(by_alias=True),
            mode="online" if online else "offline", resume="allow",
            settings=wandb.Settings(silent=True, console="off", **LAST_UPLOAD, **git_facts()),
        )  # fmt: skip
    for axis in ("step", "tokens"):
        wandb_run.define_metric(axis)
    wandb_run.define_metric("*", step_metric="step")
    if not online:
        log.info(
            f"W&B is offline; look with `wandb leet {run.folder}/wandb`, upload with `wandb sync {run.folder}/wandb/offline-run-*`"
        )
    return wandb_run


def git_facts() -> dict[str, str]:
    """Commit and remote of the code. W&B itself would keep the user name in the remote's URL, which may be a token of GitHub."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    facts = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        facts["git_commit"] = git("rev-parse", "HEAD")
        facts["git_remote_url"] = redact.redact(git("config", "--get", "remote.origin.url"))
    return facts or {"disable_git": True}


def has_key() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False
