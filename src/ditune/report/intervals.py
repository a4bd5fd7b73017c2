"""Means of paired differences with their intervals: what two methods differ in on the same images or datasets."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

STEPS = 2000  # of Simpson's rule; the quantiles below are right to five digits


@dataclass(frozen=True)
class Difference:
    """A mean difference and its interval.

    Args:
        mean: of the differences.
        low, high: ends of the interval; infinite where one pair alone tells nothing of the deviation.
        count: number of pairs.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def decides(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0


def paired(differences: Sequence[float], level: float) -> Difference:
    """The mean of paired differences with Student's interval, mean ± t s / sqrt(n).

    Args:
        differences: of n pairs, n >= 1.
        level: of the interval, such as 0.95.
    """
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return Difference(mean, -math.inf, math.inf, n)
    half = t_quantile(0.5 + level / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def stratified(groups: Sequence[Sequence[float]], level: float) -> Difference:
    """The mean over groups of their mean paired differences: mean ± t sqrt(sum_g s_g^2 / n_g) / G.

    The groups count equally and are not a sample: the interval is about other images of the same datasets.

    Args:
        groups: paired differences of each dataset, two or more of each.
        level: of the interval.
    """
    mean = statistics.fmean(statistics.fmean(group) for group in groups)
    error = math.sqrt(sum(statistics.variance(group) / len(group) for group in groups)) / len(groups)
    half = t_quantile(0.5 + level / 2, min(len(group) for group in groups) - 1) * error  # the fewest images decide
    return Difference(mean, mean - half, mean + half, sum(map(len, groups)))


@cache
def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's distribution, for 0.5 < p < 1."""
    low, high = 0.0, 1.0
    while _cdf(high, freedom) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def _cdf(t: float, freedom: int) -> float:
    """P(T < t) for t >= 0, by Simpson's rule in the angle: with t = sqrt(v) tan(a) the density is ~ cos(a)^(v-1)."""
    end = math.atan(t / math.sqrt(freedom))
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    points = (
        math.cos(end * k / STEPS) ** (freedom - 1) * (1, 4, 2)[0 if k in (0, STEPS) else 2 - k % 2]
        for k in range(STEPS + 1)
    )
    return 0.5 + scale * sum(points) * end / STEPS / 3
