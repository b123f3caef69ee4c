"""Lays out a run's panels in Weights & Biases: ted-scale wandb-workspace RUN [--x tokens]

The sections are those of the report (ted_scale/report/groups.py). Note: a panel names its numbers by a pattern, so that it also
shows those that come later, such as another corpus.
"""

import argparse
from itertools import groupby
from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.base.packages import install_extra
from ted_scale.config.run import Run
from ted_scale.config.run_file import load_run
from ted_scale.metrics.wandb_tables import HEAT_MAP, SAMPLES
from ted_scale.report.groups import GROUPS


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder; its run file names the project")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="the axis of every panel")
    parser.add_argument("--name", default="distillation", help="of the saved view")
    parser.add_argument("--entity", help="default: wandb.entity of the run file, else the one of the API key")
    return parser.parse_args(argv)


def workspace(run: Run, entity: str, name: str, x: str):
    """The saved view, not yet sent."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    sections = []
    for section, groups in groupby(GROUPS, key=lambda group: group.section):
        lines = [panels.LinePlot(title=g.title, x=x, title_y=g.y or None, metric_regex=f"^({g.keys})$") for g in groups]
        sections.append(ws.Section(name=section, panels=lines, is_open=section == "loss"))
    layers = [
        panels.LinePlot(title="Layer losses by pair", x=x, metric_regex=r"^loss/layer/.+$"),
        panels.LinePlot(title="Layer losses over time", x=x, y=[HEAT_MAP]),  # a histogram is drawn as a heat-map
    ]
    sections.insert(1, ws.Section(name="layers", panels=layers, is_open=True))
    texts = [panels.WeavePanelSummaryTable(table_name=SAMPLES)]
    sections.append(ws.Section(name="samples", panels=texts))
    settings = ws.WorkspaceSettings(x_axis=x)
    return ws.Workspace(entity=entity, project=run.wandb.project, name=name, sections=sections, settings=settings)


def checked(folder: Path) -> Run:
    """The run, if it has a W&B project and the package is there."""
    if not (folder / "run.toml").is_file():
        raise UserError(f"RUN must be a run folder (with a run.toml), but {folder} is not")
    run = load_run(folder / "run.toml")
    if run.wandb is None:
        raise UserError(
            f"wandb.project must be set in {folder}/run.toml, but is missing; name one and start the run again"
        )
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        way = install_extra("wandb-workspaces")
        raise UserError(f"wandb-workspaces must be installed, but is not; {way}") from None
    return run


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    run = checked(arguments.run)
    import wandb

    try:
        entity = arguments.entity or run.wandb.entity or wandb.Api().default_entity
        saved = workspace(run, entity, arguments.name, arguments.x).save()
    except (wandb.Error, OSError, ValueError) as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"W&B must take the view, but does not: {words}; check WANDB_API_KEY and the project"
        ) from error
    print(f"{arguments.name} of {run.wandb.project}: {saved.url}")


if __name__ == "__main__":
    run_main(main)
