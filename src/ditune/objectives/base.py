"""What every objective takes and returns."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.critic import Critic
from ditune.objectives.teacher import Teacher
from ditune.processes import Process
from ditune.rng import StepRandom


class Loss(NamedTuple):
    """The loss of one micro-batch."""

    total: Tensor  # scalar, to be differentiated
    parts: dict[str, Tensor]  # (N,) each, detached, for the log
    time: Tensor  # (N,) in [0, 1], 0 = data, 1 = noise: each sample's place on the process
    d: Tensor | None = None  # (N,) in [0, 1]: each sample's step size, for step-conditioned networks


class Network(Protocol):
    """Any network that an objective can train."""

    num_classes: int  # also the null class
    patch_size: int  # side of a token's square, in latent pixels

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *step: Tensor, **more: Tensor) -> Tensor:
        """Predict the target of the process.

        Args:
            x: (N, C, H, W) noisy data.
            t: (N,) time, in the unit of the process.
            y: (N,) labels.
            *step: (N,) step size, for step-conditioned networks.
            **more: (N,) further inputs of the network by name.

        Returns:
            (N, C, H, W), or (N, 2C, H, W) with a learned variance.
        """
        ...


@dataclass(frozen=True)
class State:
    """How far the training is.

    Args:
        step: optimizer step, from 0.
        max_steps: steps of the whole training.
        batch_size: samples of the global batch.
        ema: the network with its EMA weights, without gradient.
        teacher: the network with the weights of the last `Objective.updates_teacher`; `ema` for objectives without a
            teacher.
        base: the pretrained network, without gradient; None = the objective did not ask for it (`needs_base`).
    """

    step: int
    max_steps: int
    batch_size: int
    ema: Network
    teacher: Network
    base: Network | None = None


class Objective(ABC):
    """A training objective on one process.

    Args:
        process: path or schedule from data to noise, and how a network's output is read.
        label_drop: share of labels that are replaced by the null class, in [0, 1].

    Raises:
        UserError: `label_drop` is out of range.
    """

    has_teacher = False  # a copy of the weights is kept, in checkpoints too
    scheduled = False  # the target at a step depends on `max_steps`
    forward_mode = False  # the network is differentiated with respect to its input by torch.func.jvp
    guidance = 1.0  # classifier-free guidance of the target; 1 = none
    any_path = False  # a flow's path need not be straight
    token_share = 1.0  # tokens of a mean step, relative to those of whole images
    needs_base = False  # the loss calls the pretrained network
    teacher: Teacher | None = None  # a frozen network of any shape; None = there is none, or it has not been read yet
    critic: Critic | None = None  # trains beside the network, for the loss alone
    interval: tuple[float, float] | None = None  # quantiles of the times that are trained; None = all
    process: Process

    def __init__(self, process: Process, label_drop: float = 0.1):
        require(0 <= label_drop <= 1, "objective.label_drop", label_drop, "Set it between 0 and 1.")
        self.process, self.label_drop = process, label_drop

    @property
    def needs_null_class(self) -> bool:
        """Whether the network's label table must have a null class."""
        return self.label_drop > 0 or self.guidance != 1

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the network's constructor for the inputs that the process and the objective give it."""
        return self.process.network

    @property
    def part(self) -> tuple[float, float] | None:
        """The part of the process that is trained, 0 = data and 1 = noise; None = all of it."""
        return self.interval

    @property
    def largest(self) -> "Objective":
        """The objective of the most expensive step, for the plan's memory."""
        return self

    def check(self, batch_size: int) -> None:  # noqa: B027, few objectives have anything to refuse
        """Refuse a batch size that the objective cannot work with, before the training begins.

        Args:
            batch_size: samples of the global batch.

        Raises:
            UserError: the batch is too small.
        """

    def updates_teacher(self, step: int, max_steps: int) -> bool:
        """Whether the EMA weights become the teacher's before this step."""
        return False

    def renews_teacher(self, step: int, max_steps: int) -> bool:
        """Earlier name of `updates_teacher`."""
        return self.updates_teacher(step, max_steps)

    @abstractmethod
    def loss(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Loss:
        """Loss of one micro-batch.

        Args:
            network: the network in training.
            batch: data x_0 (N, C, H, W) and labels (N,).
            random: random numbers of these samples at this step.
            state: how far the training is.
        """

    @abstractmethod
    def denoising(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom) -> Tensor:  # (N,)
        """Denoising error of each sample: the same quantity for every objective on one process.

        Args:
            network: the network to evaluate.
            batch: data x_0 (N, C, H, W) and labels (N,).
            random: random numbers of these samples.

        Returns:
            (N,), without gradient.
        """


def checked_interval(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """`objective.interval` as (low, high); None = everything.

    Raises:
        UserError: it is no part of [0, 1].
    """
    if interval is None:
        return None
    ends = [float(end) for end in interval]
    require(
        len(ends) == 2 and 0 <= ends[0] < ends[1] <= 1,
        "objective.interval",
        ends,
        "Set it to [low, high] with 0 <= low < high <= 1, or to null.",
    )
    return ends[0], ends[1]


def drop_labels(y: Tensor, random: StepRandom, label_drop: float, null_class: int) -> Tensor:  # (N,) -> (N,)
    """Replace a share of the labels by the null class, for classifier-free guidance (arXiv 2207.12598, algorithm 1).

    Args:
        y: (N,) labels.
        random: random numbers of these samples; the purpose is "drop".
        label_drop: the share, in [0, 1].
        null_class: label of the null class.
    """
    dropped = random.uniform("drop").to(y.device) < label_drop
    return torch.where(dropped, null_class, y)
