"""An exported student as an artifact of the run's own W&B run.

Note: there is no time limit on the upload, unlike at a run's end: nothing waits for it but the user, and it may be gigabytes.
"""

from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.checkpoints.progress import Progress
from ted_scale.config.run import Run
from ted_scale.metrics.tracking import begun, said, start_service, why_offline


def check(run: Run, progress: Progress) -> None:
    """Before minutes of export."""
    if run.wandb is None or run.wandb.mode == "disabled" or progress.wandb_id is None:
        raise UserError("--wandb-artifact must have a run that W&B knows, but this one has no W&B run; leave it out")


def add(run: Run, progress: Progress, folder: Path) -> str:
    """Returns what was done, as a line."""
    import wandb

    start_service()
    offline = why_offline(run.wandb)
    artifact = wandb.Artifact(
        f"{run.name}-export", type="model", metadata={"step": progress.step, "tokens": progress.tokens}
    )
    artifact.add_dir(str(folder))
    try:
        wandb_run = begun(run, progress.wandb_id, "online" if offline is None else "offline", last_upload={})
        wandb_run.log_artifact(artifact, aliases=[f"step-{progress.step}"])
        wandb_run.finish()
    except Exception as error:  # W&B's own errors have no common class; the export itself is whole
        raise UserError(
            f"W&B must take the export, but does not ({said(error)}); {folder} is whole, try again"
        ) from error
    later = (
        ""
        if offline is None
        else f"; W&B is offline{offline}; `wandb sync {run.folder}/wandb/offline-run-*` uploads it"
    )
    return f"the artifact {artifact.name} is in the W&B run {progress.wandb_id}{later}"
