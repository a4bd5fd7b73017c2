"""The W&B workspace and the W&B report of a project's runs."""

import json
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

STEP = "trainer/global_step"
SWEPT = ("peft.name", "data.name", "optimizer.lr", "seed")


def training() -> list[Any]:
    """Panels of a training: loss, loss by quarters of the process, gradient norm, learning rate."""
    quarters = [f"train/loss_quarter_{k}" for k in range(4)]
    return [
        wr.LinePlot(title="loss", x=STEP, y=["train/loss"], smoothing_factor=0.9, log_y=True),
        wr.LinePlot(title="loss by quarters, 0 next to the data", x=STEP, y=quarters, smoothing_factor=0.9),
        wr.LinePlot(title="gradient norm", x=STEP, y=["train/grad_norm"], log_y=True),
        wr.LinePlot(title="learning rate", x=STEP, y=["train/lr"]),
    ]


def validation(metric: str) -> list[Any]:
    """Panels of what is measured while a run trains (callbacks.held_out, callbacks.metrics); empty where nothing is.

    Args:
        metric: name of the final evaluation's metric, whose kind is shown.
    """
    kind = metric.split("_")[0]
    return [
        wr.LinePlot(title="loss on held-out images", x=STEP, y=["val/loss"]),
        # a FID's name has the number of its images, which is another one here: val/fid_256 beside eval/fid_10k
        wr.LinePlot(title=f"{kind} of a few images", x=STEP, metric_regex=f"^val/{kind}_[^_]+$"),
    ]


def cost() -> list[Any]:
    """Panels of what a run took."""
    return [
        wr.BarPlot(title=title, metrics=[name], groupby=wr.Config("peft.name"), groupby_aggfunc="mean")
        for title, name in (("seconds of training", "seconds/fit"), ("peak memory in MiB", "peak_memory_mib"))
    ]


def quality(metric: str) -> list[Any]:
    """Panels of a metric, alone and against trained parameters.

    Args:
        metric: its name.
    """
    value = wr.SummaryMetric(f"eval/{metric}")  # a plain number in every finished run, see training/loggers/wandb.py
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in SWEPT]
    return [
        wr.ScatterPlot(title="trained parameters", x=wr.SummaryMetric("parameters/trained"), y=value, log_x=True),
        wr.BarPlot(title=metric, metrics=[f"eval/{metric}"], groupby=wr.Config("peft.name"), groupby_aggfunc="mean"),
        wr.ParallelCoordinatesPlot(columns=[*columns, wr.ParallelCoordinatesPlotColumn(metric=value)]),
    ]


def images() -> list[Any]:
    """Panels of images: samples from the same noise during the training, and the evaluation's grid."""
    return [
        wr.MediaBrowser(title="the same noise, by steps", media_keys=["samples"], num_columns=1),
        wr.MediaBrowser(title="evaluation", media_keys=["eval/grid"], num_columns=2),
        wr.RunComparer(diff_only="split"),
    ]


def build_workspace(entity: str, project: str, group: str | None, metric: str) -> ws.Workspace:
    """A workspace with the sections quality, images, training and cost; runs are grouped by method and dataset.

    Args:
        entity: user or team.
        project: name of the project.
        group: show only runs of this group; None = all.
        metric: name of the metric to compare.
    """
    grouping = [ws.Config("peft.name"), ws.Config("data.name")]
    filters = [] if group is None else [ws.Metric("Group") == group]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"DiTune {group or project}",
        sections=[
            ws.Section(name="Quality", panels=quality(metric), is_open=True),
            ws.Section(name="Pictures", panels=images(), is_open=True),
            ws.Section(name="Training", panels=[*validation(metric), *training()], is_open=True),
            ws.Section(name="Cost", panels=cost(), is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(groupby=grouping, filters=filters),
    )


def build_report(entity: str, project: str, group: str | None, metric: str) -> wr.Report:
    """A report with the panels of the workspace, to hand on; arguments as in `build_workspace`."""
    filters = "" if group is None else f"Metric('Group') == '{group}'"
    runs = wr.Runset(name=group or "all runs", filters=filters)  # of the report's own project
    blocks: list[Any] = [wr.TableOfContents()]
    sections = {"Quality": quality(metric), "Pictures": images()}
    sections |= {"Training": [*validation(metric), *training()], "Cost": cost()}
    for title, panels in sections.items():
        blocks += [wr.H1(title), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(entity=entity, project=project, title=f"DiTune {group or project}", blocks=blocks, width="fluid")


def specification(workspace: ws.Workspace, report: wr.Report) -> dict[str, Any]:
    """Content that saving would send, as plain values."""
    return {
        "workspace": json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)),
        "report": json.loads(report._to_model().model_dump_json(by_alias=True, exclude_none=True)),
    }
