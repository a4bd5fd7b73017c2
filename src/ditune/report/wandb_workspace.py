"""What a W&B project shows of DiTune's runs: a workspace to work in, and a report to hand on."""

import json
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

STEP = "trainer/global_step"
SWEPT = ("peft.name", "data.name", "optimizer.lr", "seed")


def training() -> list[Any]:
    """How a training goes: loss, loss by quarters of the process, gradient, rate."""
    quarters = [f"train/loss_quarter_{k}" for k in range(4)]
    return [
        wr.LinePlot(title="loss", x=STEP, y=["train/loss"], smoothing_factor=0.9, log_y=True),
        wr.LinePlot(title="loss by quarters, 0 next to the data", x=STEP, y=quarters, smoothing_factor=0.9),
        wr.LinePlot(title="gradient norm", x=STEP, y=["train/grad_norm"], log_y=True),
        wr.LinePlot(title="learning rate", x=STEP, y=["train/lr"]),
    ]


def quality(metric: str) -> list[Any]:
    """What a training is worth, and what it costs in trained parameters."""
    value = wr.SummaryMetric(f"eval/{metric}")
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in SWEPT]
    return [
        wr.ScatterPlot(title="trained parameters", x=wr.SummaryMetric("parameters/trained"), y=value, log_x=True),
        wr.BarPlot(title=metric, metrics=[f"eval/{metric}"], groupby=wr.Config("peft.name"), groupby_aggfunc="mean"),
        wr.ParallelCoordinatesPlot(columns=[*columns, wr.ParallelCoordinatesPlotColumn(metric=value)]),
    ]


def pictures() -> list[Any]:
    """The same noise at every step, and the evaluation's grid."""
    return [
        wr.MediaBrowser(title="the same noise, by steps", media_keys=["samples"], num_columns=1),
        wr.MediaBrowser(title="evaluation", media_keys=["eval/grid"], num_columns=2),
        wr.RunComparer(diff_only="split"),
    ]


def build_workspace(entity: str, project: str, group: str | None, metric: str) -> ws.Workspace:
    """Sections quality, pictures, training; runs by method and data; only those of `group` where it is given."""
    grouping = [ws.Config("peft.name"), ws.Config("data.name")]
    filters = [] if group is None else [ws.Metric("Group") == group]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"DiTune {group or project}",
        sections=[
            ws.Section(name="Quality", panels=quality(metric), is_open=True),
            ws.Section(name="Pictures", panels=pictures(), is_open=True),
            ws.Section(name="Training", panels=training(), is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(groupby=grouping, filters=filters),
    )


def build_report(entity: str, project: str, group: str | None, metric: str) -> wr.Report:
    """The same panels with headings, for those who do not work in the project."""
    filters = "" if group is None else f"Metric('Group') == '{group}'"
    runs = wr.Runset(name=group or "all runs", filters=filters)  # of the report's own project
    blocks: list[Any] = [wr.TableOfContents()]
    for title, panels in (("Quality", quality(metric)), ("Pictures", pictures()), ("Training", training())):
        blocks += [wr.H1(title), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(entity=entity, project=project, title=f"DiTune {group or project}", blocks=blocks, width="fluid")


def specification(workspace: ws.Workspace, report: wr.Report) -> dict[str, Any]:
    """What saving would send, as plain values."""
    return {
        "workspace": json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)),
        "report": json.loads(report._to_model().model_dump_json(by_alias=True, exclude_none=True)),
    }
