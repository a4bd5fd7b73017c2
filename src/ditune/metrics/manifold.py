"""Overlap of two sets of features: precision and recall, density and coverage.

Everything is computed in float64 and in chunks of rows, without holding an (N, M) matrix. Both sets are centred at the
mean of the reference: far from the origin, |a|^2 + |b|^2 - 2 a.b is a small difference of large numbers.
"""

import torch
from torch import Tensor

from ditune.errors import UserError

CHUNK = 512  # rows at once


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets (N, D), (M, D) in float64, shifted by the mean of y; distances stay the same."""
    mean = y.double().mean(0)
    return x.double() - mean, y.double() - mean


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of centred sets, (N, D), (M, D) -> (N, M)."""
    square = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
    return square.clamp(min=0).sqrt()


def radii(x: Tensor, k: int) -> Tensor:
    """Distance of every row to its k-th nearest neighbour among the other rows.

    Args:
        x: (N, D).
        k: which neighbour, 1 = the nearest.

    Returns:
        (N,).

    Raises:
        UserError: there are fewer than k other rows.
    """
    if len(x) <= k:
        raise UserError(f"The {k} nearest neighbours of {len(x)} images were asked for. Give more than {k}.")
    # the row itself is the nearest of all, so the k-th other one is the (k + 1)-th
    return torch.cat([distances(rows, x).kthvalue(k + 1).values for rows in x.split(CHUNK)])


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of generated x (N, D) for real y (M, D), both in [0, 1].

    Precision is the share of x inside the ball of a real image, recall the share of y inside the ball of a generated
    one. The radius of a ball is the distance from its centre to the k-th neighbour. Both depend on N and M.

    Args:
        x: features of generated images (N, D).
        y: features of real images (M, D).
        k: neighbour that sets the radius.

    Returns:
        (precision, recall).

    Raises:
        UserError: a set has no k other rows.

    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2.
    """
    x, y = centred(x, y)
    return _share_inside(x, y, radii(y, k)), _share_inside(y, x, radii(x, k))


def density_coverage(x: Tensor, y: Tensor, k: int = 5) -> tuple[float, float]:
    """Density (0 and up, about 1 for equal distributions) and coverage (in [0, 1]) of generated x for real y.

    Density is the number of real balls around a generated image, divided by k; coverage is the share of real balls that
    contain a generated image.

    Args:
        x: features of generated images (N, D).
        y: features of real images (M, D).
        k: neighbour that sets the radius.

    Returns:
        (density, coverage).

    Raises:
        UserError: the real set has no k other rows.

    Source: Naeem et al. 2020, arXiv 2002.09797, equations 5 and 6.
    """
    x, y = centred(x, y)
    reach = radii(y, k)
    inside, covered = 0, torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for rows in x.split(CHUNK):
        hits = distances(rows, y) < reach  # (chunk, M)
        inside += int(hits.sum())
        covered |= hits.any(0)
    return inside / (k * len(x)), covered.double().mean().item()


def _share_inside(points: Tensor, centres: Tensor, reach: Tensor) -> float:
    inside = [(distances(rows, centres) <= reach).any(1) for rows in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()
