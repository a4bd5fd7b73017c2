"""Plots of a sweep: parameters against a metric, and loss curves; one panel per dataset, one legend outside of them."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ditune.metrics.names import lower_is_better
from ditune.report.pivot import Line, pivot
from ditune.report.results import Run

SMOOTHING = 0.9  # share of the old value in a smoothed loss
MEAN = "mean over datasets"
PANEL = 4.0, 2.9  # inches: at the width of a phone, text stays readable
WIDE = 4  # ratio of the greatest and the least value from which an axis is logarithmic
MARKERS = "osD^vP*X<>"
COLORS = 10  # of matplotlib's cycle


def pareto(runs: Sequence[Run], metric: str) -> Figure:
    """Plot trained parameters against a metric, one mark per method; a line joins those that no other one beats.

    Args:
        runs: of the sweep.
        metric: its name.
    """
    table = pivot(runs, [], metric)
    names = ([MEAN] if any(line.mean is not None for line in table.lines) else []) + table.data
    figure, panels = panels_of(len(names))
    for axes, name in zip(panels, names, strict=True):
        _pareto(axes, name, table.lines, metric)
    return legend_below(figure, panels)


def pareto_panels(runs: Sequence[Run], metric: str) -> dict[str, Figure]:
    """The panels of `pareto`, each a figure of its own, by their titles; arguments likewise."""
    table = pivot(runs, [], metric)
    names = ([MEAN] if any(line.mean is not None for line in table.lines) else []) + table.data
    found = {}
    for name in names:
        figure, panels = panels_of(1)
        _pareto(panels[0], name, table.lines, metric)
        found[name] = legend_below(figure, panels)
    return found


def curves(runs: Sequence[Run]) -> Figure:
    """Plot smoothed training losses of all runs: one panel per dataset, one colour per method."""
    data = list(dict.fromkeys(run.data for run in runs))
    figure, panels = panels_of(len(data))
    for axes, name in zip(panels, data, strict=True):
        _curves(axes, name, runs)
    return legend_below(figure, panels)


def curve_panels(runs: Sequence[Run]) -> dict[str, Figure]:
    """The panels of `curves`, each a figure of its own, by dataset; those without a curve are left out."""
    found = {}
    for name in dict.fromkeys(run.data for run in runs):
        figure, panels = panels_of(1)
        _curves(panels[0], name, runs)
        if panels[0].lines:
            found[name] = legend_below(figure, panels)
    return found


def loss_curve(path: Path) -> list[tuple[int, float]]:
    """(step, smoothed loss) from a run's metrics.csv; [] if there is no file.

    Args:
        path: of the file.
    """
    if not path.is_file():
        return []
    points: list[tuple[int, float]] = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line.get("train/loss"):
                loss = float(line["train/loss"])
                old = points[-1][1] if points else loss
                points.append((int(float(line["step"])), SMOOTHING * old + (1 - SMOOTHING) * loss))
    return points


def _pareto(axes: Axes, name: str, lines: Sequence[Line], metric: str) -> None:
    points = []
    for number, line in enumerate(lines):
        row = line.rows.get(name)
        value, deviation = (
            (line.mean, line.deviation) if name == MEAN else (row and row.mean(metric), row and row.deviation(metric))
        )
        sizes = line.span("parameters") if name == MEAN else row and (row.mean("parameters"),)
        if value is None or not sizes:
            continue
        points.append((math.prod(sizes) ** (1 / len(sizes)), value))
        style = {"color": f"C{number % COLORS}", "marker": MARKERS[number % len(MARKERS)]}
        axes.errorbar(*points[-1], deviation or None, ls="", capsize=3, label=line.label, **style)
    sign = 1 if lower_is_better(metric) else -1
    front, best = [], math.inf
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if sign * y < best:
            best = sign * y
            front.append((x, y))
    if front:
        axes.plot(*zip(*front, strict=True), color="0.6", lw=1, zorder=0)
    axes.set(xscale="log", xlabel="trained parameters", ylabel=metric, title=name)
    values = [y for _, y in points]
    if values and min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)


def _curves(axes: Axes, name: str, runs: Sequence[Run]) -> None:
    methods = list(dict.fromkeys(run.method for run in runs))
    axes.set(xlabel="step", ylabel="training loss, smoothed", title=name)
    for run in runs:
        if run.data == name and (points := loss_curve(run.folder / "metrics.csv")):
            label = run.method
            known = label in axes.get_legend_handles_labels()[1]
            style = {"color": f"C{methods.index(label) % COLORS}", "alpha": 0.8, "lw": 1}
            axes.plot(*zip(*points, strict=True), label=None if known else label, **style)


def panels_of(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels: one or two of them side by side, many in rows of three."""
    across = min(count, 2 if count <= 4 else 3)
    down = math.ceil(count / across)
    figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * down + 0.6), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.grid(alpha=0.3)
    return figure, panels[:count]


def legend_below(figure: Figure, panels: Sequence[Axes]) -> Figure:
    """Add one legend for all panels, below them."""
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        longest = max(map(len, handles))
        across = max(1, int(figure.get_figwidth() * 13 / (longest + 5)))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=across, fontsize=9, frameon=False)
    return figure
