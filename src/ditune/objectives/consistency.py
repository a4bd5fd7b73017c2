"""Consistency models (Song et al. 2023, arXiv 2303.01469) on a flow, as the baselines of shortcut models.

The network's velocity u at x_t says where the path ends: x_0 = x_t - t u. Two neighbours on one path must agree on it.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Draws, Network, State
from ditune.objectives.flow_base import FlowObjective, Targets, at_most, levels_of
from ditune.processes import FlowProcess, expanded


class Consistency(FlowObjective):
    """The velocity that leads from x_t to the end which the average sees from the neighbour at t - h.

    Args:
        process: the flow; `base_steps` is M.
        clamp: hold the neighbour in [-clamp, clamp] where it is not a picture's own (4 in the code); None = not.
    """

    def __init__(self, process: FlowProcess, clamp: float | None = None, label_drop: float = 0.0):
        if label_drop:
            raise UserError("Consistency models keep their labels. Set objective.label_drop=0.")
        super().__init__(process, label_drop)
        self.finest, self.clamp = levels_of(process), clamp

    @abstractmethod
    def level(self, step: int, max_steps: int) -> int:
        """h = 2^-level."""

    @abstractmethod
    def neighbour(
        self, x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor, h: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """The path's point at t - h, (N, C, H, W)."""

    def targets(self, network: Network, x0: Tensor, y: Tensor, draws: Draws, state: State) -> Targets:
        level = self.level(state.step, state.max_steps)
        h = torch.full((len(x0),), 2.0**-level, device=x0.device)
        t = 1 - (draws.uniform("t").to(x0.device) * 2**level).floor().to(x0) * h
        noise = draws.normal("noise", x0.shape[1:]).to(x0)
        x_t = self.process.x_t(x0, noise, t)
        with torch.no_grad():
            x_s = self.neighbour(x_t, x0, noise, t, h, y, state)
            end = x_s - expanded(t - h, x_s) * self.process.velocity(state.ema, x_s, t - h, y, t - h)
        return Targets(x_t, t, y, (x_t - end) / expanded(t, x_t), t)


class ConsistencyDistillation(Consistency):
    """The neighbour is one Euler step of a trained flow away, which the training begins with (`pretrained`)."""

    has_teacher = True

    def renews_teacher(self, step: int, max_steps: int) -> bool:
        return step == 0

    def level(self, step: int, max_steps: int) -> int:
        return self.finest

    def neighbour(
        self, x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor, h: Tensor, y: Tensor, state: State
    ) -> Tensor:
        return at_most(x_t - expanded(h, x_t) * self.process.velocity(state.teacher, x_t, t, y), self.clamp)


class ConsistencyTraining(Consistency):
    """The neighbour lies on the straight path of the same picture and noise; neighbours come nearer over L parts."""

    scheduled = True

    def level(self, step: int, max_steps: int) -> int:
        return min(self.finest, step * self.finest // max_steps)

    def neighbour(
        self, x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor, h: Tensor, y: Tensor, state: State
    ) -> Tensor:
        return self.process.x_t(x0, noise, t - h)
