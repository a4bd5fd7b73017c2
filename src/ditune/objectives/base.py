"""What every objective takes and returns."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Loss(NamedTuple):
    """The loss of one micro-batch."""

    total: Tensor  # scalar, to be differentiated
    parts: dict[str, Tensor]  # (N,) each, detached, for the log
    time: Tensor  # (N,) in [0, 1], 0 = data, 1 = noise: where on the process each sample stood


class Network(Protocol):
    """Any network that an objective can train."""

    num_classes: int  # also the null class

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (N, C, H, W), t (N,), y (N,) -> (N, C or 2C, H, W)."""
        ...


class Draws(Protocol):
    """Random numbers of one step, each a function of (seed, purpose, step, position in the global batch)."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(N, *shape) standard normal."""
        ...

    def integers(self, purpose: str, high: int) -> Tensor:
        """(N,) int64 in [0, high)."""
        ...

    def uniform(self, purpose: str) -> Tensor:
        """(N,) in [0, 1)."""
        ...


def drop_labels(y: Tensor, draws: Draws, label_drop: float, null_class: int) -> Tensor:  # (N,) -> (N,)
    """Replace a share of the labels by the null class, for classifier-free guidance (arXiv 2207.12598, algorithm 1)."""
    dropped = draws.uniform("drop").to(y.device) < label_drop
    return torch.where(dropped, null_class, y)
