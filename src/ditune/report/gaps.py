"""How much of the gap between the base network's domain and each dataset a method closes, alone and over all datasets.

The gap of a dataset is KID of the base's images to it less KID of the base's images to its own domain. A method closes
KID before less KID after.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ditune.report.results import Run

ERRORS = 3  # a gap of fewer standard errors is shown and not counted
FULL = "full"  # the method that the others are measured against


@dataclass(frozen=True)
class Domain:
    """A dataset as the base network finds it.

    Args:
        name: of the dataset.
        before: KID of the base's images to it.
        own: KID of the base's images to the base's own domain.
        error: standard error of their difference.
    """

    name: str
    before: float
    own: float
    error: float

    @property
    def gap(self) -> float:
        """KID that a perfect adaptation may close."""
        return self.before - self.own

    @property
    def counted(self) -> bool:
        """Whether the gap is clearly there."""
        return self.gap >= ERRORS * self.error


@dataclass
class Method:
    """What a method closes.

    Args:
        name: of the method.
        closed: by dataset, KID before less KID after of each seed.
        after: likewise, KID after.
        rank: average over the datasets that count and on which every method has a figure; None = there is none.
        runs: all of them.
    """

    name: str
    closed: dict[str, list[float]] = field(default_factory=dict)
    after: dict[str, list[float]] = field(default_factory=dict)
    rank: float | None = None
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Gaps:
    """All methods on all datasets.

    Args:
        metric: name of the KID.
        domains: by name.
        methods: in the order of their first runs.
    """

    metric: str
    domains: dict[str, Domain]
    methods: list[Method]

    @property
    def counted(self) -> list[str]:
        """Names of the datasets whose gap counts."""
        return [name for name, domain in self.domains.items() if domain.counted]

    @property
    def full(self) -> Method | None:
        """Full fine-tuning, if it was run."""
        return next((method for method in self.methods if method.name == FULL), None)

    def share(self, method: Method, data: str) -> float | None:
        """Share of the gap on a dataset that a method closes; None if it was not run there, or there is no gap."""
        if data not in method.closed or self.domains[data].gap <= 0:
            return None
        return statistics.fmean(method.closed[data]) / self.domains[data].gap

    def of_full(self, method: Method, names: Sequence[str]) -> float | None:
        """What a method closes on these datasets in all, as a share of what full fine-tuning closes on them.

        None if one of them was not run, or full fine-tuning closes nothing.
        """
        full = self.full
        if full is None or not names or any(n not in method.closed or n not in full.closed for n in names):
            return None
        ours, theirs = (sum(statistics.fmean(m.closed[name]) for name in names) for m in (method, full))
        return ours / theirs if theirs > 0 else None

    def overall(self, method: Method) -> tuple[float | None, list[str]]:
        """Sum of what a method closes over sum of the gaps, and the datasets: that count and that it was run on."""
        names = [name for name in self.counted if name in method.closed]
        total = sum(self.domains[name].gap for name in names)
        return (sum(statistics.fmean(method.closed[name]) for name in names) / total if names else None), names

    @property
    def common(self) -> list[str]:
        """The datasets that count and on which every method has a figure."""
        return [name for name in self.counted if all(name in method.closed for method in self.methods)]


def gaps(runs: Sequence[Run]) -> Gaps | None:
    """The gaps of a sweep; None if no finished run knows the base's KID to its own domain.

    Args:
        runs: of the sweep, all by one protocol; what differs is said by `notes.differences`.
    """
    known = [run for run in runs if run.finished and "base_domain" in run.result.get("metrics", {})]
    if not known:
        return None
    metric = next(n for n in known[0].result["metrics"]["after"] if n.startswith("kid_") and not n.endswith("_std"))
    domains: dict[str, Domain] = {}
    methods: dict[str, Method] = {}
    for run in known:
        values = run.result["metrics"]
        before, own = values["before"], values["base_domain"]
        error = math.hypot(before.get(f"{metric}_std", 0.0), own.get(f"{metric}_std", 0.0))
        domains.setdefault(run.data, Domain(run.data, before[metric], own[metric], error))
        method = methods.setdefault(run.method, Method(run.method))
        method.runs.append(run)
        method.after.setdefault(run.data, []).append(values["after"][metric])
        method.closed.setdefault(run.data, []).append(before[metric] - values["after"][metric])
    found = Gaps(metric, domains, list(methods.values()))
    _rank(found)
    return found


def _rank(found: Gaps) -> None:
    """Set the average ranks; equal figures share a rank."""
    names = found.common
    for method in found.methods if names else []:
        ranks = []
        for name in names:
            own = statistics.fmean(method.closed[name])
            others = [statistics.fmean(m.closed[name]) for m in found.methods if m is not method]
            ranks.append(1 + sum(o > own for o in others) + sum(o == own for o in others) / 2)
        method.rank = statistics.fmean(ranks)
