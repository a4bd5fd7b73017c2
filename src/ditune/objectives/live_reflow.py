"""Reflow (Liu et al. 2022, arXiv 2209.03003) with pairs that the live network makes: a baseline of shortcut models."""

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Draws, Network, State, drop_labels
from ditune.objectives.flow_base import FlowObjective, Targets, guided_velocity, levels_of
from ditune.processes import FlowProcess


class LiveReflow(FlowObjective):
    """Flow matching at the finest level; one sample in some straightens the path from noise to what is drawn from it.

    Straightened samples tell the network d = 1 wherever they stand, so one network holds both flows.

    Args:
        process: the flow; its network is told steps.
        reflow_every: one sample in so many is straightened.
        steps: Euler steps in which the live network draws.
        guidance: classifier-free guidance of that drawing; 1 = none.
        label_drop: share of labels replaced by the null class, of the other samples.

    Raises:
        UserError: the process's network is not told steps.
    """

    def __init__(
        self,
        process: FlowProcess,
        reflow_every: int = 8,
        steps: int = 8,
        guidance: float = 1.0,
        label_drop: float = 0.1,
    ):
        super().__init__(process.changed(straightened=True), label_drop)
        if process.step == "none":
            raise UserError("Live reflow tells two flows apart by the step. Set objective.process.step=log2 (or size).")
        if reflow_every < 1 or steps < 1:
            raise UserError("Nothing can be straightened so. Set reflow_every and steps to 1 or more.")
        self.finest = levels_of(process)
        self.reflow_every, self.steps, self.guidance = reflow_every, steps, guidance

    def targets(self, network: Network, x0: Tensor, y: Tensor, draws: Draws, state: State) -> Targets:
        share = state.batch_size // self.reflow_every
        chosen = [p % self.reflow_every == 0 and p // self.reflow_every < share for p in draws.positions]
        straightened = torch.tensor(chosen, device=x0.device)
        base_steps, null = self.process.base_steps, network.num_classes
        t = 1 - (draws.uniform("t").to(x0.device) * base_steps).floor().to(x0) / base_steps
        d = torch.where(straightened, 1.0, 1 / base_steps)
        noise = draws.normal("noise", x0.shape[1:]).to(x0)
        y = torch.where(straightened & (self.label_drop < 1), y, drop_labels(y, draws, self.label_drop, null))
        target, rows = self.process.target(x0, noise), straightened.nonzero()[:, 0]
        if len(rows):
            drawn = self.draw(network, noise[rows], y[rows], null)
            x0 = x0.index_copy(0, rows, drawn)
            target = target.index_copy(0, rows, noise[rows] - drawn)
        return Targets(self.process.x_t(x0, noise, t), t, y, target, d)

    @torch.no_grad()
    def draw(self, network: Network, x: Tensor, y: Tensor, null_class: int) -> Tensor:
        for t in self.process.in_steps(self.steps).times()[:-1].tolist():
            times = torch.full((len(x),), t, device=x.device)
            velocity = guided_velocity(
                *(self.process, network, x, times, y, None, self.guidance, torch.ones_like(y), null_class)
            )
            x = x - velocity / self.steps
        return x
