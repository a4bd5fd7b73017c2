"""Reflow (Liu et al. 2022, arXiv 2209.03003) with pairs from the network in training: a baseline of shortcut models."""

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, State, drop_labels
from ditune.objectives.flow_base import FlowObjective, GuidedVelocity, Targets, called_rows, levels_of
from ditune.processes import FlowProcess
from ditune.rng import StepRandom


class LiveReflow(FlowObjective):
    """Flow matching at the finest level; every k-th sample is reflowed.

    A reflowed sample replaces its image by one that the network generates from the sample's noise, and learns the
    straight path between the two. Its step size is d = 1 at every t, so one network holds both flows.

    Args:
        process: the flow; its network is conditioned on the step size.
        reflow_every: k, every k-th sample is reflowed.
        steps: Euler steps of the generation.
        guidance: classifier-free guidance of the generation; 1 = none.
        label_drop: share of labels that are replaced by the null class, of the other samples.

    Raises:
        UserError: a number out of range, or a process without step sizes.
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
        remedy = "Live reflow distinguishes its two flows by the step size: set objective.process.step=log2 (or size)."
        require(process.step != "none", "objective.process.step", process.step, remedy)
        require(reflow_every >= 1, "objective.reflow_every", reflow_every, "Set it to 1 or more.")
        require(steps >= 1, "objective.steps", steps, "Set it to 1 or more.")
        self.finest = levels_of(process)
        self.reflow_every, self.steps, self.guidance = reflow_every, steps, guidance

    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """Flow matching on images, or on generated ones, see `FlowObjective.targets`."""
        share = state.batch_size // self.reflow_every
        chosen = [p % self.reflow_every == 0 and p // self.reflow_every < share for p in random.positions]
        rows = torch.tensor(chosen).nonzero()[:, 0].to(x0.device, non_blocking=True)
        reflowed = torch.tensor(chosen).to(x0.device, non_blocking=True)
        base_steps, null = self.process.base_steps, network.num_classes
        t = 1 - (random.uniform("t").to(x0.device) * base_steps).floor().to(x0) / base_steps
        d = torch.where(reflowed, 1.0, 1 / base_steps)
        noise = random.normal("noise", x0.shape[1:]).to(x0)
        y = torch.where(reflowed & (self.label_drop < 1), y, drop_labels(y, random, self.label_drop, null))
        target = self.process.target(x0, noise, t)
        called = called_rows(rows)
        if len(called):
            generated = self.generate(network, noise[called], y[called], null)[: len(rows)]
            x0 = x0.index_copy(0, rows, generated)
            target = target.index_copy(0, rows, noise[rows] - generated)
        return Targets(self.process.x_t(x0, noise, t), t, y, target, d)

    @torch.no_grad()
    def generate(self, network: Network, x: Tensor, y: Tensor, null_class: int) -> Tensor:
        """Images of the network by Euler's method.

        The guided velocity is the one of the other objectives: the sampler's is rounded in another way, and stored
        runs depend on it.

        Args:
            network: the network in training.
            x: (N, C, H, W) noise.
            y: (N,) labels.
            null_class: label of the null class.

        Returns:
            (N, C, H, W).
        """
        velocity = GuidedVelocity(self.process, network, y, self.guidance, torch.ones(len(y)), null_class)
        for t in self.process.in_steps(self.steps).times()[:-1].tolist():
            x = x - velocity(x, torch.full((len(x),), t, device=x.device)) / self.steps
        return x
