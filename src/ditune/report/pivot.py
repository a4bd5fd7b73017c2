"""One metric of a sweep as in papers: methods in rows, datasets in columns, then the mean and the average rank."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ditune.metrics.names import lower_is_better
from ditune.report.results import Row, Run, clearly_best, rows
from ditune.report.status import Job


@dataclass
class Line:
    """A method, under one setting, on all datasets.

    Args:
        label: the method, with what else the sweep varied.
        method: name of the PEFT method.
        rows: its runs by dataset.
        jobs: those without a result, by dataset.
        mean: of the metric over the datasets; None if one of them lacks it.
        deviation: of that mean over seeds; None if the datasets do not have the same seeds, two or more.
        rank: average over the datasets; None likewise.
    """

    label: str
    method: str
    rows: dict[str, Row] = field(default_factory=dict)
    jobs: dict[str, list[Job]] = field(default_factory=lambda: defaultdict(list))
    mean: float | None = None
    deviation: float | None = None
    rank: float | None = None

    def span(self, name: str) -> tuple[float, float] | None:
        """Least and greatest value of a number over all runs, such as the parameters: a label table grows with K."""
        values = [run.values[name] for row in self.rows.values() for run in row.runs if name in run.values]
        return (min(values), max(values)) if values else None

    def statuses(self, data: str) -> list[str]:
        """Status of every job on a dataset."""
        runs = self.rows[data].runs if data in self.rows else []
        return [run.status[0] for run in runs] + [job.status for job in self.jobs.get(data, [])]


@dataclass(frozen=True)
class Pivot:
    """Methods x datasets.

    Args:
        metric: name of the metric.
        data: names of the datasets, the columns.
        lines: the rows.
        best: by dataset, the line that is clearly the best; "" = of the means.
    """

    metric: str
    data: list[str]
    lines: list[Line]
    best: dict[str, Line]


def pivot(runs: Sequence[Run], jobs: Sequence[Job], metric: str) -> Pivot:
    """Arrange a sweep by methods and datasets.

    Args:
        runs: with a result.
        jobs: without one.
        metric: name of the metric.
    """
    lines = _lines(rows(runs))
    for job in jobs:
        if job.method is not None and job.data is not None:
            own = [line for line in lines if line.method == job.method]
            if not own:
                own = [Line(job.method, job.method)]
                lines += own
            if len(own) == 1:  # of several settings, nobody knows which one the job has
                own[0].jobs[job.data].append(job)
    data = list(dict.fromkeys([run.data for run in runs] + [name for line in lines for name in line.jobs]))
    if len(data) > 1:
        _compare(lines, data, metric)
    return Pivot(metric, data, lines, _best(lines, data, metric))


def _lines(table: Sequence[Row]) -> list[Line]:
    """Lines that have one row on every dataset; where a label has more of them, the label says what differs."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in table:
        groups[row.label, row.data].append(row)
    by_rate = {label for (label, _), own in groups.items() if len({row.lr for row in own}) > 1}
    by_steps = {label for (label, _), own in groups.items() if len({row.max_steps for row in own}) > 1}
    lines: dict[str, Line] = {}
    for row in table:
        parts = [row.label]
        parts += [f"lr {row.lr:g}"] if row.label in by_rate else []
        parts += [f"{row.max_steps:,} steps"] if row.label in by_steps else []
        name, count = ", ".join(parts), 1
        while row.data in lines.get(name, Line("", "")).rows:  # they differ in what no label tells
            count += 1
            name = f"{', '.join(parts)} ({count})"
        lines.setdefault(name, Line(name, row.method)).rows[row.data] = row
    return list(lines.values())


def _compare(lines: Sequence[Line], data: Sequence[str], metric: str) -> None:
    """Set mean, deviation and rank of the lines that have the metric on every dataset; others would compare unlike."""
    means = {id(line): [line.rows[name].mean(metric) if name in line.rows else None for name in data] for line in lines}
    complete = [line for line in lines if None not in means[id(line)]]
    sign = 1 if lower_is_better(metric) else -1
    for line in complete:
        own = means[id(line)]
        line.mean, line.deviation = statistics.fmean(own), _deviation(line, metric)
        others = [means[id(other)] for other in complete if other is not line]
        better = [sum(sign * o[k] < sign * v for o in others) for k, v in enumerate(own)]
        equal = [sum(o[k] == v for o in others) for k, v in enumerate(own)]
        line.rank = statistics.fmean(1 + b + e / 2 for b, e in zip(better, equal, strict=True))


def _deviation(line: Line, metric: str) -> float | None:
    """Of the mean over datasets, over seeds that every dataset has."""
    values = [
        {json.dumps(run.result["seed"]): run.values[metric] for run in row.finished if metric in run.values}
        for row in line.rows.values()
    ]
    seeds = set(values[0])
    if len(seeds) < 2 or any(set(own) != seeds for own in values):
        return None
    return statistics.stdev(statistics.fmean(own[seed] for own in values) for seed in seeds)


def _best(lines: Sequence[Line], data: Sequence[str], metric: str) -> dict[str, Line]:
    found = {}
    for name in data:
        own = [line for line in lines if name in line.rows and line.rows[name].mean(metric) is not None]
        values = [(line.rows[name].mean(metric), line.rows[name].deviation(metric)) for line in own]
        place = clearly_best(values, lower_is_better(metric))
        if place is not None:
            found[name] = own[place]
    means = [line for line in lines if line.mean is not None]
    place = clearly_best([(line.mean, line.deviation) for line in means], lower_is_better(metric))
    return found if place is None else found | {"": means[place]}
