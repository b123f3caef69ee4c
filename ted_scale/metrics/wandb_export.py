"""Adds an exported student to the run's own W&B run, as an artifact.

Note: unlike at a run's end, the upload has no time limit. Only the user waits for it, and it may be gigabytes.
"""

from pathlib import Path

from ted_scale.base.errors import Gone, UserError
from ted_scale.checkpoints import holder
from ted_scale.checkpoints.progress import Progress
from ted_scale.config.run import Run
from ted_scale.metrics.wandb_connection import begun, said, start_service, why_offline


def check(run: Run, progress: Progress, folder: Path) -> None:
    """Refuse early what would fail after minutes of export. A run that still trains has its W&B run open, and an export would end
    it."""
    if run.wandb is None or run.wandb.mode == "disabled" or progress.wandb_id is None:
        raise UserError("--wandb-artifact must have a run that W&B knows, but this one has no W&B run; leave it out")
    try:
        holder.when_free(folder, holder.look(folder))
    except Gone:
        raise UserError(
            f"--wandb-artifact must have a run that no process uses, but one uses {folder}; wait for its end, or leave it out"
        ) from None


def add(run: Run, progress: Progress, folder: Path, export: Path) -> str:
    """Returns a line about what was done. `folder` is the run's folder as it was found: run.toml may name it relative to another
    current folder."""
    import wandb

    start_service()
    offline = why_offline(run.wandb)
    artifact = wandb.Artifact(
        f"{run.name}-export", type="model", metadata={"step": progress.step, "tokens": progress.tokens}
    )
    artifact.add_dir(str(export))
    try:
        wandb_run = begun(
            run, progress.wandb_id, "online" if offline is None else "offline", last_upload={}, folder=folder
        )
        wandb_run.log_artifact(artifact, aliases=[f"step-{progress.step}"])
        wandb_run.finish()
    except Exception as error:  # W&B's errors have no common class; the export itself is complete
        raise UserError(
            f"W&B must take the export, but does not ({said(error)}); {export} is whole, try again"
        ) from error
    later = (
        "" if offline is None else f"; W&B is offline{offline}; `wandb sync {folder}/wandb/offline-run-*` uploads it"
    )
    return f"the artifact {artifact.name} is in the W&B run {progress.wandb_id}{later}"
