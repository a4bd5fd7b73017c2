"""What the objectives on a flow share: a subclass gives the target of the velocity."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ditune.distributed import in_group
from ditune.errors import UserError
from ditune.objectives.base import Loss, Network, Objective, State, drop_labels
from ditune.objectives.variational_bound import mean_flat
from ditune.processes import FlowProcess, expanded
from ditune.rng import StepRandom
from ditune.samplers.guidance import guide


class Targets(NamedTuple):
    """Inputs of the network and the velocity that it should predict there."""

    x_t: Tensor  # (N, C, H, W)
    t: Tensor  # (N,) in [0, 1]
    y: Tensor  # (N,) labels, dropped ones replaced by the null class
    target: Tensor  # (N, C, H, W), no gradient
    d: Tensor | None = None  # (N,) in [0, t], step size that the velocity is averaged over; None = 0
    w: Tensor | None = None  # (N,) guidance scale that the network is given; None = it is not given one


class FlowObjective(Objective):
    """The squared error of the velocity. A subclass implements `targets`, and `weights` if it weights the error.

    Args:
        process: the flow.
        label_drop: share of labels that are replaced by the null class, in [0, 1].

    Raises:
        UserError: `label_drop` is out of range.
    """

    process: FlowProcess

    @abstractmethod
    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """What the network should predict, and where.

        Args:
            network: the network in training, for targets that depend on it.
            x0: (N, C, H, W) data.
            y: (N,) labels.
            random: random numbers of these samples at this step.
            state: how far the training is, and the EMA and teacher networks.
        """

    def weights(self, mse: Tensor, targets: Targets, state: State) -> Tensor:  # (N,)
        """Weights of the squared errors `mse` (N,); 1 by default."""
        return torch.ones_like(mse)

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Loss:
        """Weighted squared error of the velocity, see `Objective.loss`."""
        targets = self.targets(network, *batch, random, state)
        return self.compared(targets, self.predicted(network, targets), state)

    def predicted(self, network: Network, targets: Targets) -> Tensor:  # (N, C, H, W)
        """The network's velocity where the targets are."""
        # or torch 2.10's autocast takes the weights that it has cast for the targets, which have no gradient
        torch.clear_autocast_cache()
        called = with_scale(network, targets.w)
        return self.process.velocity(called, targets.x_t, targets.t, targets.y, targets.d)

    def compared(self, targets: Targets, velocity: Tensor, state: State) -> Loss:
        """The loss of a predicted velocity (N, C, H, W)."""
        mse = mean_flat((velocity - targets.target) ** 2)
        loss = self.weights(mse, targets, state) * mse
        parts = {"loss": loss, "mse": mse, "velocity_rms": rms(velocity), "target_rms": rms(targets.target)}
        return Loss(loss.mean(), {name: value.detach() for name, value in parts.items()}, targets.t, targets.d)

    @torch.no_grad()
    def denoising(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom) -> Tensor:  # (N,)
        """Squared error of the instantaneous velocity at uniform times, whatever times the training prefers."""
        x0, y = batch
        t, noise = random.uniform("t").to(x0), random.normal("noise", x0.shape[1:]).to(x0)
        y = drop_labels(y, random, self.label_drop, network.num_classes)
        velocity = self.process.velocity(network, self.process.x_t(x0, noise, t), t, y)
        return mean_flat((velocity - self.process.target(x0, noise, t)) ** 2)


@dataclass(frozen=True)
class GuidedVelocity:
    """The velocity of one network with classifier-free guidance of some samples.

    Args:
        process: the flow.
        network: whose velocity it is.
        y: (N,) labels.
        scale: guidance scale; 1 = none.
        guided: (N,) bool on the CPU, the samples with guidance. The network runs a second time for these alone.
        null_class: label of the null class.
    """

    process: FlowProcess
    network: Network
    y: Tensor
    scale: float
    guided: Tensor
    null_class: int

    def __call__(self, x: Tensor, t: Tensor, d: Tensor | None = None) -> Tensor:
        """Velocity (N, C, H, W) at x (N, C, H, W) and t (N,), averaged over the step size d (N,); None = 0."""
        conditional = self.process.velocity(self.network, x, t, self.y, d)
        rows = self.guided.nonzero()[:, 0].to(x.device, non_blocking=True)
        called = called_rows(rows)
        if self.scale == 1 or len(called) == 0:
            return conditional
        null = torch.full_like(self.y[called], self.null_class)
        step = None if d is None else d[called]
        unconditional = self.process.velocity(self.network, x[called], t[called], null, step)[: len(rows)]
        pushed = guide(conditional[rows], unconditional, self.scale, form="from_unconditional")
        return conditional.index_copy(0, rows, pushed)


@torch.no_grad()
def mean_of_two_steps(
    velocity: GuidedVelocity, x: Tensor, t: Tensor, step: Tensor, *, limit: float | None
) -> Tensor:  # (N, C, H, W)
    """Mean velocity of two successive Euler steps, the target of one step of twice the size.

    Shortcut models (arXiv 2410.12557) and progressive distillation (arXiv 2202.00512) learn it:
    target = (v1 + v2) / 2 with v1 = u(x_t, t, h), x' = x_t - h v1, v2 = u(x', t - h, h).

    Args:
        velocity: u, of the teacher.
        x: (N, C, H, W) point x_t.
        t: (N,) its time.
        step: (N,) size h of each of the two steps.
        limit: the point between the steps is clamped to [-limit, limit]; None = not.
    """
    v1 = velocity(x, t, step)
    between = clamp(x - expanded(step, x) * v1, limit)
    return (v1 + velocity(between, t - step, step)) / 2


def levels_of(process: FlowProcess) -> int:
    """L = log2(M), the number of halvings from step size 1 to the finest step size 1/M.

    Raises:
        UserError: the process has no finest step size.
    """
    if process.base_steps is None:
        raise UserError(
            "objective.process.base_steps is null, but this objective needs a finest step size. "
            "Set objective.process.base_steps=128."
        )
    return process.base_steps.bit_length() - 1


def clamp(x: Tensor, limit: float | None) -> Tensor:
    """Clamp x to [-limit, limit]; None = not."""
    return x if limit is None else x.clamp(-limit, limit)


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Logit-normal times sigmoid(mean + std z) (arXiv 2403.03206), z = the normal quantile of u (N,) in [0, 1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)))


def rms(x: Tensor) -> Tensor:  # (N, ...) -> (N,)
    """Root mean square of each sample."""
    return mean_flat(x.square()).sqrt()


def with_scale(network: Network, w: Tensor | None) -> Callable[..., Tensor]:
    """The network with the guidance scales w (N,) as its input; None = as it is."""
    return network if w is None else partial(network, w=w)


def called_rows(rows: Tensor) -> Tensor:
    """The rows that the network is called for: `rows`, or the first one where processes that share a network have none.

    Each of them must call a network in shares (`trainer=fsdp`) equally often. What comes of the first row is not used.

    Args:
        rows: (M,) int64 of the micro-batch.
    """
    return rows if len(rows) or not in_group() else rows.new_zeros(1)
