"""Weights & Biases: one W&B run for each run, with the same id after every restart, and without secrets.

A thread opens the W&B run and sends everything in order, so neither the start nor a step waits for the network. If W&B cannot be
reached, this start stays offline, with the same folder and id. Note: W&B retries temporary errors for ATTEMPT_S. So an error that
comes earlier is final, for example a wrong key.
"""

import contextlib
import importlib.metadata
import math
import os
import platform
import queue
import re
import secrets
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import ted_scale
from ted_scale.base import redact
from ted_scale.base.durable import write_durably
from ted_scale.base.errors import clean, shortened
from ted_scale.base.paths import NoFile, open_file
from ted_scale.config.operation import Wandb
from ted_scale.config.run import Run
from ted_scale.distill.stages import stages_of
from ted_scale.metrics import alerts
from ted_scale.metrics.console import log_line
from ted_scale.ranks import pulse, signals

ATTEMPT_S, PATIENCE_S = 20.0, 180.0  # for one try to go online, for all tries
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the old name and the new one
KEPT = 10_000  # rows and messages that wait until the W&B run is open
# The end of a run and the message about a fault may not wait for the network for ever. `wandb sync` uploads the rest.
LAST_UPLOAD = {"finish_timeout": 30, "finish_timeout_raises": True}
STOPPING_S = 5  # after a signal; `wandb sync` sends the rest
ID_FILE, LONGEST_ID = "wandb_id", 64
LOOK_S = 10.0  # between two checks whether the run stalls
PACKAGES = ("torch", "deepspeed", "transformers", "triton", "numpy", "torchao", "liger-kernel", "wandb")
CLOSE_S = ATTEMPT_S + LAST_UPLOAD["finish_timeout"] + 10


class WandbRun:
    """The W&B run `run_id`. `open_run(closing)` opens it in the thread; `closing` is set when the run ends."""

    def __init__(self, run_id: str, open_run, step_s: float = math.inf):
        self.id, self.open_run, self.step_s, self.full = run_id, open_run, step_s, False
        self.stalls: pulse.Pulse | None = None  # the work about which an alert was sent
        self.actions: queue.SimpleQueue = queue.SimpleQueue()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True, name="wandb")
        self.thread.start()

    def tell(self, action) -> None:
        """Let the thread call `action(wandb_run)`."""
        if self.actions.qsize() < KEPT:
            self.actions.put(action)
        elif not self.full and self.thread.is_alive():
            self.full = True
            log_line(f"W&B is behind by {KEPT:,} rows and misses some from here on; metrics.jsonl has every number")

    def work(self) -> None:
        """The thread. If W&B's process is gone (crashed, or killed together with the rank's children), training goes on without
        it."""
        try:
            wandb_run = self.open_run(self.closing)
            while action := self.awaited(wandb_run):
                action(wandb_run)
        except (Exception, SystemExit) as error:  # W&B's teardown may raise SystemExit
            log_line(f"W&B is lost until the next start ({said(error)}); metrics.jsonl has every number")

    def awaited(self, wandb_run):
        """Wait for the next action. Meanwhile the thread checks whether the run stalls."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self.actions.get(timeout=LOOK_S)
            alert = alerts.stalled(pulse.now, time.monotonic(), self.step_s)
            if alert and pulse.now is not self.stalls:
                self.stalls = pulse.now
                alerts.send(alert, wandb_run)

    def close(self) -> None:
        self.closing.set()
        for last in (lambda wandb_run: wandb_run.finish(), None):
            self.actions.put(last)
        self.thread.join(STOPPING_S if signals.asked.is_set() else CLOSE_S)


def open_wandb(run: Run, run_id: str | None) -> WandbRun | None:
    """Open the W&B run, or resume it by its id, without waiting for it."""
    if run.wandb is None or run.wandb.mode == "disabled":
        return None
    run_id = run_id or id_in(run.folder) or secrets.token_hex(4)
    keep_id(run.folder, run_id)
    with contextlib.suppress(Exception):  # the thread gets the same error and logs it
        start_service()
    return WandbRun(run_id, partial(opened, run, run_id), run.limits.step_s)


def id_in(folder: Path) -> str | None:
    """The id from an earlier start. That start may have ended before its first checkpoint, so the id has a file of its own."""
    with (
        contextlib.suppress(NoFile, OSError, ValueError),
        os.fdopen(open_file(folder / ID_FILE), encoding="ascii") as file,
    ):
        found = file.read(LONGEST_ID + 1)
        return found if re.fullmatch(rf"[\w-]{{1,{LONGEST_ID}}}", found, re.ASCII) else None
    return None


def keep_id(folder: Path, run_id: str) -> None:
    """Write the id to its file. A full disk does not stop the run: the checkpoints have the id, too."""
    if id_in(folder) != run_id:
        with contextlib.suppress(OSError):
            write_durably(folder / ID_FILE, run_id)


def start_service() -> None:
    """Start W&B's own process, in the main thread if possible, because this changes the environment. W&B uploads every variable
    of Slurm, and SLURM_JWT is a key. W&B's error reports would upload tracebacks, from which no secret is removed."""
    import wandb

    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with redact.out_of_the_environment("SLURM"):
        wandb.setup(wandb.Settings(silent=True))


def opened(run: Run, run_id: str, closing: threading.Event):
    """W&B's run: online if W&B answers within PATIENCE_S, else offline."""
    import wandb

    why, until = why_offline(run.wandb), time.monotonic() + PATIENCE_S
    while why is None:
        began = time.monotonic()
        try:
            return begun(run, run_id, "online")
        except Exception as error:
            is_final = time.monotonic() - began < ATTEMPT_S
            wandb.teardown(1)  # else W&B refuses the next try, because the id is in use
            start_service()
            if is_final or closing.is_set() or time.monotonic() > until:
                why = f", because {why_not(error)}; the next start tries again"
    folder = f"{run.folder}/wandb"
    log_line(f"W&B is offline{why}; look with `wandb leet {folder}`, upload with `wandb sync {folder}/offline-run-*`")
    return begun(run, run_id, "offline")


def why_not(error: Exception) -> str:
    if "error 401" in str(error):
        return f"it refuses the API key ({said(error)}): correct WANDB_API_KEY, or run `wandb login`"
    return f"it could not be reached ({said(error)})"


def begun(
    run: Run,
    run_id: str,
    mode: Literal["online", "offline"],
    last_upload: dict = LAST_UPLOAD,
    folder: Path | None = None,
):
    import wandb

    settings = run.wandb
    wandb_run = wandb.init(
        project=settings.project, entity=settings.entity, group=group_of(run), job_type=job_of(run), name=run.name,
        id=run_id, tags=settings.tags, notes=settings.notes, dir=str(folder or run.folder), config=run.model_dump(by_alias=True),
        mode=mode, resume="allow",
        settings=wandb.Settings(silent=True, console="off", init_timeout=ATTEMPT_S, **last_upload, **git_facts()),
    )  # fmt: skip
    for axis in ("step", "tokens"):
        wandb_run.define_metric(axis)
    wandb_run.define_metric("*", step_metric="step")
    return wandb_run


def group_of(run: Run) -> str:
    """The W&B group of the run, of its exports, and of everything else that belongs to it."""
    return run.wandb.group or run.name


def job_of(run: Run) -> str:
    """The W&B job type: all stages of the run, which share one W&B run (docs/design/0050-one-wandb-run.md)."""
    return "+".join(stage.name for stage in stages_of(run))


def add_facts(facts: dict, wandb_run) -> None:
    """Write the facts of this start to W&B's config. A resume may have other ranks, packages or another commit."""
    wandb_run.config.update(facts, allow_val_change=True)


def facts_of(plan: dict) -> dict:
    facts = {"plan": plan, "world": plan["world"], "ds_config": plan["ds_config"], "versions": versions()}
    return redact.cleaned(facts | {"git_commit": git_facts().get("git_commit")})


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that change numbers or speed."""
    found = {"python": platform.python_version(), "ted_scale": ted_scale.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def add_stage(name: str, wandb_run) -> None:
    wandb_run.summary["stage"] = name


def why_offline(settings: Wandb) -> str | None:
    """Why W&B stays offline. None if it goes online when it can."""
    if settings.mode == "offline":
        return ""
    return None if has_key() else ", because there is no API key: set WANDB_API_KEY or run `wandb login`"


def has_key() -> bool:
    """Whether there is a key in the environment or in .netrc, for W&B's own hosts or for WANDB_BASE_URL."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc()
        return any(known.authenticators(host) for host in ([own] if own else HOSTS))
    return False


def git_facts() -> dict[str, str]:
    """Commit and remote of this code, if it is a checkout. An installed package may lie in a repository of its user. W&B itself
    would report that repository, and would keep the user name in the remote's URL, which may be a GitHub token."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "pyproject.toml").is_file():
        return {"disable_git": True}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    facts = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        facts["git_commit"] = git("rev-parse", "HEAD")
        facts["git_remote_url"] = redact.redact(git("config", "--get", "remote.origin.url"))
    return facts or {"disable_git": True}


def said(error: BaseException) -> str:
    return shortened(f"{type(error).__name__}: {clean(' '.join(str(error).split()))}", 300)
