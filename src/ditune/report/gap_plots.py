"""The plane of what is learned and what is forgotten: one panel for each dataset that lacks classes of the base."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ditune.report.gap_tables import measured
from ditune.report.gaps import Gaps, Method, gaps
from ditune.report.plots import COLORS, MARKERS, legend_below, panels_of
from ditune.report.results import Run


def learned_and_forgotten(runs: Sequence[Run]) -> Figure | None:
    """Plot the share of the gap that closes against what KID of untrained classes loses; a mark for each method.

    Upwards is forgotten: the classes that the dataset lacks have moved away from the base's own domain.

    Args:
        runs: of the sweep.

    Returns:
        The figure; None if no run has its forgotten classes measured.
    """
    found = gaps(runs)
    if found is None:
        return None
    names = [name for name in found.domains if any(_forgotten(method, name) for method in found.methods)]
    if not names:
        return None
    figure, panels = panels_of(len(names))
    for axes, name in zip(panels, names, strict=True):
        _plane(axes, name, found)
    return legend_below(figure, panels)


def _plane(axes: Axes, name: str, found: Gaps) -> None:
    for number, method in enumerate(found.methods):
        lost = _forgotten(method, name)
        share = found.share(method, name)
        if not lost or share is None:
            continue
        changes = [values["after"] - values["before"] for values in lost]
        error = statistics.fmean(values["error"] for values in lost)  # of one evaluation, not over seeds
        style = {"color": f"C{number % COLORS}", "marker": MARKERS[number % len(MARKERS)]}
        axes.errorbar(100 * share, statistics.fmean(changes), error, ls="", capsize=3, label=method.name, **style)
    axes.axhline(0, color="0.6", lw=1, zorder=0)
    axes.set(xlabel="gap closed, %", ylabel="KID of untrained classes, change", title=name)
    axes.margins(0.12)


def _forgotten(method: Method, name: str) -> list[dict[str, float]]:
    """What was measured of the classes that a dataset lacks, of each seed."""
    own = [measured(run) for run in method.runs if run.data == name]
    return [values["forgotten"] for values in own if "forgotten" in values]
