"""What is known about each metric by its name: one row per family, read by suites, trainings, reports and summaries.

A new metric is its formula in this folder and one row in `METRICS`. This file imports nothing heavy.
"""

from dataclasses import dataclass

NOT_A_RESULT = (" before", "_std")  # endings: of the base network's value, and of a value's standard error


@dataclass(frozen=True)
class Metric:
    """A family of metrics, such as `kid` of `kid_efflite0` and `kid_inception`.

    Args:
        name: the family; a metric is named `<name>` or `<name>_<what it was computed with>`.
        higher_is_better: whether a higher value is the better one.
        compared: whether tables mark the best value, and a training may choose its weights by it.
        headline: whether the log's last lines show it, and reports may choose it as their main metric.
    """

    name: str
    higher_is_better: bool
    compared: bool = True
    headline: bool = False

    def includes(self, name: str) -> bool:
        """Whether the metric `name` belongs to this family."""
        return name == self.name or name.startswith(f"{self.name}_")


# The first headline that a run has is the main metric of its report.
METRICS: tuple[Metric, ...] = (
    Metric("fid", higher_is_better=False, headline=True),
    Metric("kid", higher_is_better=False, headline=True),
    Metric("fd", higher_is_better=False, headline=True),
    Metric("test_loss", higher_is_better=False, headline=True),
    Metric("sfid", higher_is_better=False),
    Metric("is", higher_is_better=True),
    Metric("precision", higher_is_better=True),
    Metric("recall", higher_is_better=True),
    Metric("density", higher_is_better=True),
    Metric("coverage", higher_is_better=True),
    Metric("nearest", higher_is_better=False, compared=False),  # near zero, images are copies: neither end is best
)


def family(name: str) -> Metric | None:
    """The row of a metric; None for other numbers, such as counts."""
    return next((metric for metric in METRICS if metric.includes(name)), None)


def is_compared(name: str) -> bool:
    """Whether methods can be ranked by this number: a metric of the trained network that has a better end."""
    metric = family(name)
    return metric is not None and metric.compared and not name.endswith(NOT_A_RESULT)


def lower_is_better(name: str) -> bool:
    """Whether less is better; so it is of numbers that are no metrics, such as costs."""
    metric = family(name)
    return metric is None or not metric.higher_is_better


def headline(name: str) -> bool:
    """Whether a run's log shows this metric in its last lines."""
    metric = family(name)
    return metric is not None and metric.headline and not name.endswith(NOT_A_RESULT)


def first_headline(names: list[str]) -> str | None:
    """The metric that stands for a report: the first of `METRICS` that is a headline and is in `names`.

    Args:
        names: of the numbers that the runs have.

    Returns:
        FID where there is one, else KID, else another Frechet distance, else the loss on test images; else None.
    """
    headlines = (metric for metric in METRICS if metric.headline)
    return next((n for metric in headlines for n in names if metric.includes(n) and headline(n)), None)
