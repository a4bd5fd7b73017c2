"""Consistency models (Song et al. 2023, arXiv 2303.01469) on a flow, as the baselines of shortcut models.

The network's velocity u at x_t gives the end of the path, f(x_t, t) = x_t - t u. Two neighbours on one path must give
the same end: CD and CT differ in how the neighbour at t - h is found.
"""

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Loss, Network, Objective, State
from ditune.objectives.critic import critic_of
from ditune.objectives.flow_base import FlowObjective, Targets, clamp, levels_of
from ditune.objectives.variational_bound import mean_flat
from ditune.processes import FlowProcess, expanded
from ditune.rng import StepRandom


class Consistency(FlowObjective):
    """The target velocity leads from x_t to the end that the EMA network gives from the neighbour at t - h.

    Args:
        process: the flow; `base_steps` is M.
        clamp: a neighbour that the teacher computes is clamped to [-clamp, clamp] (4 in the code of arXiv 2410.12557);
            None = not.
        label_drop: must be 0, consistency models keep their labels.
        critic: arguments of a `Critic` of the predicted ends; None = there is none.

    Raises:
        UserError: `label_drop` is not 0, the process has no finest step size, or the critic is refused.
    """

    def __init__(
        self,
        process: FlowProcess,
        clamp: float | None = None,
        label_drop: float = 0.0,
        critic: Mapping[str, Any] | None = None,
    ):
        remedy = "Set objective.label_drop=0: labels are kept."
        require(label_drop == 0, "objective.label_drop", label_drop, remedy)
        require(clamp is None or clamp > 0, "objective.clamp", clamp, "Set it above 0, or to null.")
        super().__init__(process, label_drop)
        self.finest, self.clamp, self.critic = levels_of(process), clamp, critic_of(critic)

    @property
    def largest(self) -> Objective:
        """Without the critic, which is small beside the network; its second derivatives cannot be counted."""
        plain = copy.copy(self)
        plain.critic = None
        return plain

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Loss:
        """The squared error, or (1 - w) of it, w of what a critic says of f(x_t, t), and w of the critic's own loss."""
        if self.critic is None:
            return super().loss(network, batch, random, state)
        targets = self.targets(network, *batch, random, state)
        velocity = self.predicted(network, targets)
        end = targets.x_t - expanded(targets.t, velocity) * velocity  # f(x_t, t)
        plain, w = self.compared(targets, velocity, state), self.critic.weights(targets.t)
        losses = self.critic.losses(batch[0], end, targets.t, state.step)
        mse = mean_flat((velocity - targets.target) ** 2)
        loss = torch.lerp(mse, losses.generator, w)
        parts = {"loss": loss, "generator": losses.generator, "critic": losses.critic}
        parts = plain.parts | {name: value.detach() for name, value in parts.items()}
        return plain._replace(total=(loss + w * losses.critic).mean(), parts=parts)

    @abstractmethod
    def level(self, step: int, max_steps: int) -> int:
        """Level of the distance h = 2^-level between neighbours, at an optimizer step of `max_steps`."""

    @abstractmethod
    def neighbour(
        self, x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor, h: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """The path's point at t - h.

        Args:
            x_t: (N, C, H, W) point at t.
            x0: (N, C, H, W) data.
            noise: (N, C, H, W) noise of x_t.
            t: (N,) time of x_t.
            h: (N,) distance of the neighbour.
            y: (N,) labels.
            state: gives the teacher.

        Returns:
            (N, C, H, W).
        """

    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """(x_t - f(x_{t-h}, t - h)) / t by the EMA network, see `FlowObjective.targets`."""
        level = self.level(state.step, state.max_steps)
        h = torch.full((len(x0),), 2.0**-level, device=x0.device)
        t = 1 - (random.uniform("t").to(x0.device) * 2**level).floor().to(x0) * h
        noise = random.normal("noise", x0.shape[1:]).to(x0)
        x_t = self.process.x_t(x0, noise, t)
        with torch.no_grad():
            x_s = self.neighbour(x_t, x0, noise, t, h, y, state)
            end = x_s - expanded(t - h, x_s) * self.process.velocity(state.ema, x_s, t - h, y, t - h)
        return Targets(x_t, t, y, (x_t - end) / expanded(t, x_t), t)


class ConsistencyDistillation(Consistency):
    """Consistency distillation: the neighbour is one Euler step of the teacher away.

    Args:
        teacher: run folder or network file of a frozen flow of any shape; None = the trained flow that the training
            begins with (`pretrained`).
        process, others: see `Consistency`.
    """

    def __init__(self, process: FlowProcess, teacher: str | None = None, **others: Any):
        super().__init__(process, **others)
        self.has_teacher = teacher is None  # a copy of the weights

    def updates_teacher(self, step: int, max_steps: int) -> bool:
        """Once, before the first step."""
        return self.has_teacher and step == 0

    def level(self, step: int, max_steps: int) -> int:
        """L, always: h = 1/M."""
        return self.finest

    def neighbour(
        self, x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor, h: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """x_t - h v by the teacher's velocity v, clamped, see `Consistency.neighbour`."""
        process, teacher = (self.process, state.teacher)
        if self.teacher is not None:
            process, teacher = self.teacher.process, self.teacher
        return clamp(x_t - expanded(h, x_t) * process.velocity(teacher, x_t, t, y), self.clamp)


class ConsistencyTraining(Consistency):
    """Consistency training: the neighbour is on the straight path of the same image and noise.

    The distance h halves at every part of the training, from 1 to 2/M in L parts of equal length.
    """

    scheduled = True

    def level(self, step: int, max_steps: int) -> int:
        """0 in the first part of the training, L - 1 in the last."""
        return min(self.finest, step * self.finest // max_steps)

    def neighbour(
        self, x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor, h: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """x_{t-h} of the same image and noise, see `Consistency.neighbour`."""
        return self.process.x_t(x0, noise, t - h)
