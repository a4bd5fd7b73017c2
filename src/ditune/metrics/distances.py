"""Distances between two sets of features (N, D) and (M, D); everything is computed in float64.

KID is unbiased, so it can be compared between sets of different sizes; the Frechet distance is not (its bias falls
as 1/N), so it is only comparable at equal N.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from ditune.errors import UserError

log = logging.getLogger(__name__)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel of KID, k(a, b) = (a.b / D + 1)^3: (N, D), (M, D) -> (N, M).

    Source: Binkowski et al. 2018, arXiv 1801.01401.
    """
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_sums(x: Tensor, y: Tensor, u: Tensor, v: Tensor, chunk: int = 512) -> Tensor:
    """sum_ij u_is k(x_i, y_j) v_js, without holding the whole (N, M) kernel.

    Args:
        x: (N, D).
        y: (M, D).
        u: weights (N, S).
        v: weights (M, S).
        chunk: rows of x at once.

    Returns:
        (S,).
    """
    parts = zip(x.split(chunk), u.split(chunk), strict=True)
    return torch.stack([(weights * (polynomial_kernel(rows, y) @ v)).sum(0) for rows, weights in parts]).sum(0)


def squared_mmd(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Unbiased MMD^2 of S pairs of subsets.

    Args:
        x: (N, D).
        y: (M, D).
        u: 0 or 1 (N, S); column s selects the rows of x in subset s.
        v: 0 or 1 (M, S), the same for y.

    Returns:
        (S,).

    Source: Gretton et al. 2012, equation 3 (the sums over one set leave out the diagonal i = j).
    """
    n, m = u.sum(0), v.sum(0)
    diagonal_x = u.T @ (x.square().sum(1) / x.shape[1] + 1) ** 3  # (S,)
    diagonal_y = v.T @ (y.square().sum(1) / y.shape[1] + 1) ** 3
    within_x = (kernel_sums(x, x, u, u) - diagonal_x) / (n * (n - 1))
    within_y = (kernel_sums(y, y, v, v) - diagonal_y) / (m * (m - 1))
    return within_x + within_y - 2 * kernel_sums(x, y, u, v) / (n * m)


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel inception distance over all samples (no random subsets), in the features of any extractor.

    Its mean is zero for two sets of samples of one distribution; single values are then also negative.

    Args:
        x: (N, D).
        y: (M, D).

    Raises:
        UserError: there are fewer than two samples, or values are not finite.

    Source: Binkowski et al. 2018, arXiv 1801.01401.
    """
    x, y = check(x, y, least=2)
    return squared_mmd(x, y, x.new_ones(len(x), 1), y.new_ones(len(y), 1)).item()


def kid_with_deviation(x: Tensor, y: Tensor, subsets: int = 100, seed: int = 0) -> tuple[float, float]:
    """KID over all samples and its standard error.

    The standard deviation over random halves (without replacement) estimates that of the value over all samples: it is
    the delete-d jackknife with d = n/2, whose factor (n - d)/d is 1 (Shao & Wu 1989). It is too large where KID is near
    zero. It does not cover the variation over training seeds.

    Args:
        x: (N, D).
        y: (M, D).
        subsets: number of random halves.
        seed: of the halves.

    Returns:
        (KID, its standard error).

    Raises:
        UserError: there are fewer than four samples, or values are not finite.
    """
    x, y = check(x, y, least=4)
    generator = torch.Generator().manual_seed(seed)

    def columns(count: int) -> Tensor:  # (count, 1 + subsets): all samples, then the halves
        ranks = torch.rand(count, subsets, generator=generator).argsort(0)
        halves = (ranks < count // 2).to(x)
        return torch.cat([halves.new_ones(count, 1), halves], dim=1)

    values = squared_mmd(x, y, columns(len(x)), columns(len(y)))
    return values[0].item(), values[1:].std().item()


@cache
def warn_of_bias(count: int, dimensions: int) -> None:
    """Once: a training may measure it every few steps."""
    log.warning("Frechet distance of %d samples in %d dimensions is biased upwards.", count, dimensions)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of the Gaussians fitted to both sets (1/(n-1) covariances).

    With centred features X = Q R, S_x = R_x^T R_x / (n-1), so Tr (S_x S_y)^(1/2) is the nuclear norm of
    R_x R_y^T / sqrt((n-1)(m-1)): no matrix root, no complex numbers, exact for singular covariances too.
    Logs a warning if N <= D (the fit is singular, the bias large).

    Args:
        x: (N, D).
        y: (M, D).

    Raises:
        UserError: there are fewer than two samples, or values are not finite.

    Source: Dowson & Landau 1982; Heusel et al. 2017, arXiv 1706.08500.
    """
    x, y = check(x, y, least=2)
    fewest, dimensions = min(len(x), len(y)), x.shape[1]
    if fewest <= dimensions:
        warn_of_bias(fewest, dimensions)
    x_centred, y_centred = x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    r_x, r_y = (torch.linalg.qr(centred, mode="r").R for centred in (x_centred, y_centred))  # (min(N, D), D)
    trace_root = torch.linalg.svdvals(r_x @ r_y.T).sum() / (n * m) ** 0.5
    traces = x_centred.square().sum() / n + y_centred.square().sum() / m
    return ((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * trace_root).item()


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D), float64, with 1/(N-1)."""
    (x, _) = check(x, x, least=2)
    return x.mean(0), torch.cov(x.T)


def frechet_from_statistics(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """Frechet distance of two Gaussians whose statistics are known, as in published reference files; float64.

    Tr (S_x S_y)^(1/2) is the sum of the roots of the eigenvalues of the symmetric S_x^(1/2) S_y S_x^(1/2).

    Args:
        mean_x: (D,).
        cov_x: (D, D).
        mean_y: (D,).
        cov_y: (D, D).
    """
    values, vectors = torch.linalg.eigh(cov_x.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ cov_y.double() @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (mean_x.double() - mean_y.double()).square().sum()
    return (shift + cov_x.double().trace() + cov_y.double().trace() - 2 * trace_root).item()


def check(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64.

    Raises:
        UserError: there are fewer than `least` samples, or values are not finite.
    """
    for features in (x, y):
        if len(features) < least:
            raise UserError(f"A distance needs at least {least} images, here are {len(features)}. Generate more.")
        if not features.isfinite().all():
            raise UserError("The features hold NaN or infinity. Restore the feature extractor's weights file.")
    return x.double(), y.double()


def self_test() -> None:
    """Check that this machine's linear algebra gives right distances; a broken BLAS fails silently.

    Known answers: FD(x, x) = 0; FD(x, x T + b) = |mean shift|^2 + Tr Cov(x T - x) for symmetric positive T, because
    T is then the optimal transport between the two Gaussians; KID by elementwise products instead of matmul.

    Raises:
        RuntimeError: a distance is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    x, y, root = torch.randn(3, 192, 96, dtype=torch.float64, generator=generator)
    transport = root.T @ root / len(root)
    moved = x @ transport + 0.5
    expected = (moved - x).mean(0).square().sum() + (moved - x).var(0).sum()

    def naive_kid(a: Tensor, b: Tensor) -> float:
        kernel = lambda p, q: ((p[:, None] * q).sum(-1) / p.shape[1] + 1) ** 3  # noqa: E731
        aa, bb = (kernel(p, p).masked_fill(torch.eye(len(p), dtype=torch.bool), 0).sum() for p in (a, b))
        pairs_a, pairs_b = len(a) * (len(a) - 1), len(b) * (len(b) - 1)
        return (aa / pairs_a + bb / pairs_b - 2 * kernel(a, b).mean()).item()

    results = {
        "FD of a set to itself": (frechet_distance(x, x), 0.0),
        "FD of two Gaussians": (frechet_distance(x, moved), expected.item()),
        "KID of one distribution": (kid(x[:48], y[:32]), naive_kid(x[:48], y[:32])),
        "KID of two distributions": (kid(x[:48], moved[:32]), naive_kid(x[:48], moved[:32])),
    }
    for what, (found, right) in results.items():
        if not abs(found - right) <= 1e-8 * (1 + abs(right)):
            raise RuntimeError(f"{what} came out as {found}, not {right}: the linear algebra library here is broken.")
