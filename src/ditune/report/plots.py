"""Plots and sample grids of a sweep: parameters against a metric, loss curves, samples of all methods."""

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ditune.generation.grids import sheet
from ditune.metrics.names import lower_is_better
from ditune.report.results import Run, rows

SMOOTHING = 0.9  # share of the old value in a smoothed loss
SHOWN_ROWS, SHOWN_COLUMNS = 2, 8  # of each run's grid


def pareto(runs: Sequence[Run], metric: str) -> Figure:
    """Plot trained parameters against a metric, one mark per row; a line joins the rows that no other one beats.

    Args:
        runs: of the sweep.
        metric: its name.
    """
    table = [row for row in rows(runs) if row.mean(metric) is not None]
    data = list(dict.fromkeys(row.data for row in table))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="trained parameters", ylabel=metric)
    for k, name in enumerate(data):
        own = sorted((row for row in table if row.data == name), key=lambda row: row.mean("parameters"))
        x, y = ([row.mean(key) for row in own] for key in ("parameters", metric))
        errors = [row.deviation(metric) or 0 for row in own]
        axes.errorbar(x, y, errors, fmt="o", color=f"C{k}", capsize=3, label=name)
        sign = 1 if lower_is_better(metric) else -1
        front = [i for i in range(len(own)) if all(sign * y[i] < sign * y[j] for j in range(i))]
        axes.plot([x[i] for i in front], [y[i] for i in front], color=f"C{k}", alpha=0.4)
        for row, a, b in zip(own, x, y, strict=True):
            axes.annotate(row.label, (a, b), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.grid(alpha=0.3)
    axes.margins(0.15)
    axes.legend(title="data")
    return figure


def curves(runs: Sequence[Run]) -> Figure:
    """Plot smoothed training losses of all runs: one panel per dataset, one colour per method."""
    data = list(dict.fromkeys(run.data for run in runs))
    methods = list(dict.fromkeys(run.method for run in runs))
    figure = Figure(figsize=(7, 3.5 * len(data)), layout="constrained")
    panels = figure.subplots(len(data), squeeze=False)[:, 0]
    for axes, name in zip(panels, data, strict=True):
        axes.set(xlabel="step", ylabel="training loss, smoothed", title=name)
        axes.grid(alpha=0.3)
        for run in runs:
            if run.data == name and (points := loss_curve(run.folder / "metrics.csv")):
                label, color = run.method, f"C{methods.index(run.method)}"
                known = label in axes.get_legend_handles_labels()[1]
                axes.plot(*zip(*points, strict=True), color=color, alpha=0.8, label=None if known else label)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    return figure


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


def methods_sheet(runs: Sequence[Run]) -> Image.Image | None:
    """Samples of all methods: methods in rows, datasets in columns, all generated from the same noise.

    Of several seeds the first one is shown.

    Args:
        runs: of the sweep.

    Returns:
        The grid; None if no run has samples.
    """
    chosen: dict[tuple[str, str], Run] = {}
    for run in sorted((run for run in runs if run.finished), key=lambda run: run.result["seed"]):
        if (run.folder / "samples" / "grid.png").is_file():
            chosen.setdefault((run.method, run.data), run)
    if not chosen:
        return None
    methods = list(dict.fromkeys(run.method for run in runs if any(method == run.method for method, _ in chosen)))
    data = list(dict.fromkeys(run.data for run in runs if any(name == run.data for _, name in chosen)))
    tops = {key: top_of_grid(run.folder / "samples" / "grid.png") for key, run in chosen.items()}
    size = tuple(max(top.size[k] for top in tops.values()) for k in (0, 1))
    table = []
    for method in methods:
        images = [tops.get((method, name), Image.new("RGB", size, "white")) for name in data]
        padded = [image if image.size == size else _padded(image, size) for image in images]
        table.append([(image, f"{method}, {name}") for image, name in zip(padded, data, strict=True)])
    return sheet(table, pad=8)


def top_of_grid(path: Path) -> Image.Image:
    """The first rows of a grid of 8 columns."""
    with Image.open(path) as grid:
        side = grid.width // SHOWN_COLUMNS
        return grid.convert("RGB").crop((0, 0, grid.width, min(grid.height, SHOWN_ROWS * side)))


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image)
    return canvas
