"""What a reader must know of a table: how it was computed, and what differs between runs that stand side by side."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from ditune.report.comparability import warnings
from ditune.report.pivot import Pivot
from ditune.report.results import PRECISION, Run

BOLD = (
    "Bold: the best mean of a column, if every figure in it has two seeds or more and its mean ± standard deviation "
    "overlaps no other's. Otherwise nothing in the column is bold."
)
RANK = (
    "Mean and average rank: over the datasets, of methods that have a figure on every one; ranked among themselves, "
    "equal figures share a rank."
)
RANGE = "Trained parameters: least and greatest over the datasets, because a label table grows with the classes."
NO_BEFORE = (
    "No loss before the training: classes=reinit starts with a new label table, so the base network has no loss "
    "on these classes."
)
NAMES_SHOWN = 3
# what runs may differ in without being comparable, and where a run says it
DIFFERENCES: dict[str, Callable[[Run, str], object]] = {
    "steps of training": lambda run, _: run.result.get("max_steps"),
    "batch size": lambda run, _: run.result.get("batch_size"),
    "precision": lambda run, _: run.result.get("precision", run.config.get(PRECISION)),
    "network": lambda run, _: run.config.get("network.name"),
    "generated images": lambda run, metric: run.protocol(metric).get("n"),
    "sampler": lambda run, metric: run.protocol(metric).get("sampler"),
    "sampling steps": lambda run, metric: run.protocol(metric).get("steps"),
    "guidance": lambda run, metric: run.protocol(metric).get("guidance"),
    "resolution": lambda run, metric: run.protocol(metric).get("resolution"),
}


def notes(table: Pivot, runs: Sequence[Run]) -> list[str]:
    """Sentences under a pivot.

    Args:
        table: the pivot.
        runs: of the sweep.
    """
    found = [seeds(table), BOLD]
    if len(table.data) > 1:
        found += [RANK, RANGE]
    finished = [run for run in runs if run.finished]
    return found + differences(finished, table.metric) + warnings(finished, table.metric)


def seeds(table: Pivot) -> str:
    """How many seeds stand behind the figures."""
    counts = {len(row.finished) for line in table.lines for row in line.rows.values() if row.finished}
    if not counts:
        return "No run has finished."
    if counts == {1}:
        return "One seed each, so no deviation is known."
    shown = str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    fewer = "" if len(counts) == 1 else f" A figure of fewer than {max(counts)} says so."
    return f"Mean ± standard deviation over seeds, {shown} for each figure.{fewer}"


def differences(runs: Sequence[Run], metric: str) -> list[str]:
    """One sentence for each thing in which the runs differ, although their figures stand side by side.

    Args:
        runs: finished ones.
        metric: name of the metric that is compared.
    """
    found = []
    for title, value_of in DIFFERENCES.items():
        groups: dict[str, list[str]] = defaultdict(list)
        for run in runs:
            if (value := value_of(run, metric)) is not None:
                groups[f"{value:,}" if isinstance(value, int) else str(value)].append(f"{run.method} on {run.data}")
        if len(groups) > 1:
            found.append(f"Not comparable as they stand: the runs differ in {title}. {_listed(groups)}.")
    return found


def _listed(groups: dict[str, list[str]]) -> str:
    order = sorted(groups, key=lambda value: len(groups[value]))
    parts = [f"{value}: {_few(groups[value])}" for value in order[:-1]]
    return "; ".join([*parts, f"{order[-1]}: the others"])


def _few(names: Sequence[str]) -> str:
    kinds = list(Counter(names))
    more = len(kinds) - NAMES_SHOWN
    return ", ".join(kinds[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
