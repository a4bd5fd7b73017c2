"""What the objectives on a flow share: they differ in the target of the velocity, and the rest stands here."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Draws, Loss, Network, State, drop_labels
from ditune.objectives.variational_bound import mean_flat
from ditune.processes import FlowProcess, expanded


class Targets(NamedTuple):
    """What the network should say where."""

    x_t: Tensor  # (N, C, H, W)
    t: Tensor  # (N,) in [0, 1]
    y: Tensor  # (N,) labels, dropped ones replaced by the null class
    target: Tensor  # (N, C, H, W), no gradient
    d: Tensor | None = None  # (N,) in [0, t], length of the step that the velocity is averaged over; None = 0


class FlowObjective(ABC):
    """The squared error of the velocity.

    Args:
        process: the flow.
        label_drop: share of labels replaced by the null class, in [0, 1].

    Raises:
        UserError: a number out of range.
    """

    has_teacher = False
    scheduled = False
    forward_mode = False

    def __init__(self, process: FlowProcess, label_drop: float = 0.1):
        if not 0 <= label_drop <= 1:
            raise UserError(f"label_drop is a share of the labels, but is {label_drop}. Set it between 0 and 1.")
        self.process, self.label_drop = process, label_drop

    @abstractmethod
    def targets(self, network: Network, x0: Tensor, y: Tensor, draws: Draws, state: State) -> Targets:
        """What is learned from x_0 (N, C, H, W) and labels (N,)."""

    def check(self, batch_size: int) -> None:  # noqa: B027, few objectives have anything to refuse
        """Nothing of a flow's objective depends on the batch, unless it says so."""

    def renews_teacher(self, step: int, max_steps: int) -> bool:
        return False

    def weights(self, mse: Tensor, targets: Targets, state: State) -> Tensor:  # (N,)
        """Of the squared errors."""
        return torch.ones_like(mse)

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], draws: Draws, state: State) -> Loss:
        targets = self.targets(network, *batch, draws, state)
        # or torch 2.10's autocast takes the weights that it has cast for the targets, which have no gradient
        torch.clear_autocast_cache()
        velocity = self.process.velocity(network, targets.x_t, targets.t, targets.y, targets.d)
        mse = mean_flat((velocity - targets.target) ** 2)
        loss = self.weights(mse, targets, state) * mse
        parts = {"loss": loss, "mse": mse, "velocity_rms": rms(velocity), "target_rms": rms(targets.target)}
        return Loss(loss.mean(), {name: value.detach() for name, value in parts.items()}, targets.t, targets.d)

    @torch.no_grad()
    def denoising(self, network: Network, batch: tuple[Tensor, Tensor], draws: Draws) -> Tensor:  # (N,)
        """Error of the velocity at times that are uniform, whatever the training prefers."""
        x0, y = batch
        t, noise = draws.uniform("t").to(x0), draws.normal("noise", x0.shape[1:]).to(x0)
        y = drop_labels(y, draws, self.label_drop, network.num_classes)
        velocity = self.process.velocity(network, self.process.x_t(x0, noise, t), t, y)
        return mean_flat((velocity - self.process.target(x0, noise)) ** 2)


def guided_velocity(
    process: FlowProcess,
    network: Network,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    d: Tensor | None,
    scale: float,
    guided: Tensor,
    null_class: int,
) -> Tensor:  # (N, C, H, W)
    """The velocity with classifier-free guidance in the rows `guided` (N,), which alone are computed twice."""
    conditional = process.velocity(network, x, t, y, d)
    rows = guided.nonzero()[:, 0]
    if scale == 1 or len(rows) == 0:
        return conditional
    null = torch.full_like(y[rows], null_class)
    unconditional = process.velocity(network, x[rows], t[rows], null, None if d is None else d[rows])
    return conditional.index_copy(0, rows, unconditional + scale * (conditional[rows] - unconditional))


@torch.no_grad()
def two_steps(
    process: FlowProcess,
    teacher: Network,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    h: Tensor,
    scale: float,
    guided: Tensor,
    null_class: int,
    clamp: float | None,
) -> Tensor:  # (N, C, H, W)
    """Mean velocity of two steps of length h (N,) of the teacher; the point between them is held in [-clamp, clamp]."""
    v1 = guided_velocity(process, teacher, x, t, y, h, scale, guided, null_class)
    between = at_most(x - expanded(h, x) * v1, clamp)
    return (v1 + guided_velocity(process, teacher, between, t - h, y, h, scale, guided, null_class)) / 2


def levels_of(process: FlowProcess) -> int:
    """L = log2(M): how often the step of length 1 is halved to the finest one.

    Raises:
        UserError: the process has no finest step.
    """
    if process.base_steps is None:
        raise UserError("The objective halves steps down to a finest one. Set objective.process.base_steps=128.")
    return process.base_steps.bit_length() - 1


def at_most(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """sigmoid(mean + std z) (arXiv 2403.03206) of the normal quantile z of u in [0, 1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)))


def rms(x: Tensor) -> Tensor:  # (N, ...) -> (N,)
    return mean_flat(x.square()).sqrt()
