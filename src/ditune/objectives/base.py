"""What every objective takes and returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Loss(NamedTuple):
    """The loss of one micro-batch."""

    total: Tensor  # scalar, to be differentiated
    parts: dict[str, Tensor]  # (N,) each, detached, for the log
    time: Tensor  # (N,) in [0, 1], 0 = data, 1 = noise: where on the process each sample stood
    d: Tensor | None = None  # (N,) in [0, 1]: length of the step that each sample taught, where steps are told


class Network(Protocol):
    """Any network that an objective can train."""

    num_classes: int  # also the null class

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *step: Tensor) -> Tensor:
        """x (N, C, H, W), t (N,), y (N,), and where it is told steps step (N,) -> (N, C or 2C, H, W)."""
        ...


class Draws(Protocol):
    """Random numbers of one step, each a function of (seed, purpose, step, position in the global batch)."""

    positions: Sequence[int]  # in the global batch

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(N, *shape) standard normal."""
        ...

    def integers(self, purpose: str, high: int) -> Tensor:
        """(N,) int64 in [0, high)."""
        ...

    def uniform(self, purpose: str) -> Tensor:
        """(N,) in [0, 1)."""
        ...


@dataclass(frozen=True)
class State:
    """Where the training stands.

    Args:
        step: optimizer step, from 0.
        max_steps: of the whole training.
        batch_size: global batch.
        ema: the network with its averaged weights; no gradient is asked of it.
        teacher: the network with the weights of `Objective.renews_teacher`; `ema` where an objective has no teacher.
    """

    step: int
    max_steps: int
    batch_size: int
    ema: Network
    teacher: Network


class Objective(Protocol):
    """What is learned."""

    process: object
    has_teacher: bool  # a copy of the weights is kept, in checkpoints too
    scheduled: bool  # what is learned at a step depends on the length of the training
    forward_mode: bool  # the network is differentiated by its input, with torch.func.jvp

    def check(self, batch_size: int) -> None:
        """Refuse what cannot work, before a training begins."""
        ...

    def renews_teacher(self, step: int, max_steps: int) -> bool:
        """Whether the average becomes the teacher before this step."""
        ...

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], draws: Draws, state: State) -> Loss:
        """Loss of one micro-batch (x_0 (N, C, H, W), labels (N,))."""
        ...

    def denoising(self, network: Network, batch: tuple[Tensor, Tensor], draws: Draws) -> Tensor:  # (N,)
        """How well each sample is denoised: the same quantity for every objective on one process."""
        ...


def drop_labels(y: Tensor, draws: Draws, label_drop: float, null_class: int) -> Tensor:  # (N,) -> (N,)
    """Replace a share of the labels by the null class, for classifier-free guidance (arXiv 2207.12598, algorithm 1)."""
    dropped = draws.uniform("drop").to(y.device) < label_drop
    return torch.where(dropped, null_class, y)
