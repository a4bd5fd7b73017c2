"""Plots of routing statistics (arXiv 2407.11633, Fig. 5-7: expert choice over layer, position, timestep, class)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditune.files.atomic import atomic
from ditune.moe.statistics import RoutingStatistics
from ditune.networks.routing import load

if TYPE_CHECKING:  # matplotlib is imported by the functions: most trainings make no figure
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_load(statistics: RoutingStatistics, path: Path) -> None:
    """Heat map of the load, layers by experts; 1 = even.

    Args:
        statistics: of a network.
        path: PNG file to write.
    """
    figure, (axes,) = _panels(figsize=(1.5 + 0.5 * statistics.load_LE.shape[1], 1.2 + 0.3 * len(statistics.layers)))
    _heat_map(axes, statistics.load_LE, "load of the experts, 1 = even", "layer")
    axes.set_yticks(range(len(statistics.layers)), statistics.layers)
    _save(figure, path)


def draw_by(statistics: RoutingStatistics, name: str, path: Path) -> None:
    """Heat maps of the load by time, position or class and expert, one panel per layer for at most six layers.

    For positions every expert has its own map, side by side: a map of each position's preferred expert would hide the
    others.

    Args:
        statistics: of a network.
        name: 'time', 'position' or 'class'.
        path: PNG file to write.
    """
    chosen = torch.linspace(0, len(statistics.layers) - 1, min(6, len(statistics.layers))).round().long().tolist()
    tables = load(statistics.counts[name].cpu()).nan_to_num()  # (L, C, E); rows that never occurred stay empty
    numbers = statistics.per_layer()[f"mi_{name}"]
    figure, panels = _panels(len(chosen), figsize=(10, 2.2 * len(chosen)))
    for axes, i in zip(panels, chosen, strict=True):
        title = f"layer {statistics.layers[i]}: mutual information {numbers[i]:.4f} nats"
        if name == "position":
            side = round(tables.shape[1] ** 0.5)
            maps = tables[i].T.reshape(-1, side, side)  # (E, rows, columns)
            gap = torch.full((len(maps), side, 1), float("nan"))
            _heat_map(axes, torch.cat([maps, gap], dim=2).permute(1, 0, 2).flatten(1), title, "row")
            axes.set_xlabel("column, for every expert")
        else:
            _heat_map(axes, tables[i].T, title, "expert")
            axes.set_xlabel({"time": "time, from data to noise", "class": "class, the last is the null class"}[name])
    _save(figure, path)


def _panels(rows: int = 1, **size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(**size)
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _heat_map(axes: Axes, table: Tensor, title: str, rows: str) -> None:
    image = axes.imshow(table, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(rows)
    axes.figure.colorbar(image, ax=axes)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
