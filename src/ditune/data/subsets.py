"""A few images that stand for all: by k-means or herding on features, or at random.

After E2GAN (arXiv 2401.06127), which trains on a portion of its data, chosen by clusters. How it clusters in detail is
not published; what stands here is ours.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ditune.errors import UserError, require
from ditune.rng import generator

ITERATIONS = 50  # of Lloyd's algorithm, at most
ROWS = 4096  # whose distances to all centres are in memory at once

Choose = Callable[[Tensor, int, int], list[int]]  # features (N, D) float64, n, seed -> n rows


def choose(
    names: Sequence[str],
    labels: Tensor,
    features: Callable[[], Tensor],
    *,
    n: int,
    by: str = "k_means",
    seed: int = 0,
    balanced: bool = False,
) -> list[int]:
    """Rows of the chosen images, ascending.

    Args:
        names: (N) names of the images.
        labels: (N,) their classes.
        features: gives (N, D) features; called where `by` needs them.
        n: number of images, in 1..N; N = all.
        by: 'k_means', 'herding' or 'random'. 'random' depends on the names alone, so it needs no features.
        seed: of 'k_means' and 'random'.
        balanced: choose within each class, as many of each as there are.

    Raises:
        UserError: `n` is out of range, or `by` is unknown.
    """
    count = len(names)
    require(by in (*WAYS, "random"), "data.subset.by", by, f"Choose one of {', '.join((*WAYS, 'random'))}.")
    if not 1 <= n <= count:
        raise UserError(f"data.subset.n is {n:,}, and there are {count:,} training images. Set it between 1 and that.")
    if n == count:
        return list(range(count))
    values = None if by == "random" else features().double()
    groups = [torch.arange(count)] if not balanced else [(labels == k).nonzero()[:, 0] for k in labels.unique()]
    rows: list[int] = []
    for group, quota in zip(groups, quotas([len(group) for group in groups], n), strict=True):
        if values is None:
            chosen = at_random([names[i] for i in group.tolist()], quota, seed)
        else:
            chosen = WAYS[by](values[group], quota, seed)
        rows += group[chosen].tolist()
    return sorted(rows)


def of_client(
    names: Sequence[str], labels: Tensor, *, client: int, clients: int, by: str = "random", seed: int = 0
) -> list[int]:
    """Rows of one client's share of the images, ascending; the shares are disjoint, and together they are all.

    Args:
        names: (N) names of the images.
        labels: (N,) their classes.
        client: of 0..clients - 1.
        clients: number of shares.
        by: 'random': equal shares, by a hash of each name; 'classes': every class has one client, and each client
            equally many classes.
        seed: of the order of names or classes.

    Raises:
        UserError: `by` is unknown, or there are too few images or classes.
    """
    require(by in ("random", "classes"), "data.subset.by", by, "Choose one of random, classes.")
    units = list(names) if by == "random" else [f"class {k}" for k in labels.unique().tolist()]
    if not 0 <= client < clients or clients > len(units):
        raise UserError(
            f"data.subset has client {client} of {clients}, and there are {len(units):,} "
            f"{'images' if by == 'random' else 'classes'} to share. Give 0 <= client < clients, and fewer clients."
        )
    mine = at_random(units, len(units), seed)[client::clients]
    if by == "random":
        return sorted(mine)
    classes = labels.unique()[mine]
    return torch.isin(labels, classes).nonzero()[:, 0].tolist()


def quotas(sizes: Sequence[int], n: int) -> list[int]:
    """n shared among groups as evenly as their sizes allow; what is left goes to the first ones."""
    shares = [0] * len(sizes)
    while n > 0:
        for k in [k for k, size in enumerate(sizes) if shares[k] < size][:n]:
            shares[k] += 1
            n -= 1
    return shares


def at_random(names: Sequence[str], n: int, seed: int) -> list[int]:
    """The n images whose names have the smallest hashes: smaller subsets lie in larger ones."""

    def key(i: int) -> bytes:
        return hashlib.sha256(f"subset {seed}: {names[i]}".encode()).digest()

    return sorted(range(len(names)), key=key)[:n]


def k_means(x: Tensor, n: int, seed: int) -> list[int]:
    """The image nearest to each of n centres, among the images of its cluster.

    Lloyd's algorithm from k-means++ centres (Arthur & Vassilvitskii 2007). A centre without images moves to the image
    that is farthest from its own.

    Args:
        x: (N, D) float64.
        n: number of clusters, at most N.
        seed: of the first centres.
    """
    if n == 0:
        return []
    centres = x[_plus_plus(x, n, seed)]
    of_before = None
    for _ in range(ITERATIONS):
        cluster, squares = _nearest(x, centres)
        if of_before is not None and torch.equal(cluster, of_before):
            break
        of_before = cluster
        centres, sizes = _means(x, cluster, n)
        for k in (sizes == 0).nonzero()[:, 0].tolist():
            farthest = int(squares.argmax())
            centres[k], squares[farthest] = x[farthest], -1
    cluster, squares = _nearest(x, centres)
    chosen, free = [], []
    for k in range(n):
        members = (cluster == k).nonzero()[:, 0]
        if len(members):
            chosen.append(int(members[squares[members].argmin()]))
        else:  # equal images
            free.append(k)
    rest = [i for i in squares.argsort(descending=True, stable=True).tolist() if i not in set(chosen)]
    return chosen + rest[: len(free)]


def herding(x: Tensor, n: int, seed: int) -> list[int]:
    """Greedily keep the mean of the chosen images near to that of all (Welling 2009; arXiv 1611.07725, algorithm 4).

    Image k minimises |mu - (x + sum of those before) / k|; smaller subsets lie in larger ones. Nothing is random.

    Args:
        x: (N, D) float64.
        n: number of images, at most N.
        seed: not used.
    """
    mean, total = x.mean(dim=0), torch.zeros_like(x[0])  # (D,) each
    norms, chosen = x.square().sum(dim=1), []
    taken = torch.zeros(len(x), dtype=torch.bool)
    for k in range(1, n + 1):
        # |k mu - total - x|^2 without its part that all x share
        score = norms - 2 * x @ (k * mean - total)
        score[taken] = torch.inf
        i = int(score.argmin())
        taken[i] = True
        total += x[i]
        chosen.append(i)
    return chosen


WAYS: dict[str, Choose] = {"k_means": k_means, "herding": herding}


def _plus_plus(x: Tensor, n: int, seed: int) -> list[int]:
    """Rows of the first centres: each with a probability proportional to its squared distance to those before."""
    numbers = torch.rand(n, dtype=torch.float64, generator=generator(seed, len(x)))
    rows = [int(numbers[0] * len(x))]
    squares = (x - x[rows[0]]).square().sum(dim=1)
    for u in numbers[1:]:
        total = squares.cumsum(dim=0)
        if total[-1] == 0:  # only copies are left
            rows.append(next(i for i in range(len(x)) if i not in rows))
            continue
        rows.append(min(int(torch.searchsorted(total, u * total[-1], right=True)), len(x) - 1))
        squares = torch.minimum(squares, (x - x[rows[-1]]).square().sum(dim=1))
    return rows


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each row, and its squared distance, (N,) each."""
    found = [torch.cdist(part, centres).min(dim=1) for part in x.split(ROWS)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found]).square()


def _means(x: Tensor, cluster: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Means (n, D) and sizes (n,) of the clusters; an empty one has a mean of zeros."""
    sizes = cluster.bincount(minlength=n)
    sums = torch.zeros(n, x.shape[1], dtype=x.dtype).index_add_(0, cluster, x)
    return sums / sizes.clamp(min=1)[:, None], sizes
