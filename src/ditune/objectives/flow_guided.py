"""Flow-guided distillation to one step (SlimFlow, Zhu et al. 2024, arXiv 2407.12718, eq. 11-13).

The student v learns the one step from t = 1 to 0 twice: from a pair (z, x), and from new noise z by two steps of the
teacher v_phi, a straightened flow:

    L = |z - v(z, 1) - x|^2 + |z - v(z, 1) - (z - (1 - t) v_0 - t v_phi(x_t, t))|^2,    x_t = z - (1 - t) v_0

The teacher's two steps are of lengths 1 - t and t. v_0 is the velocity of the first one. The paper also has LPIPS as
the distance, which needs decoded images and weights that are not shipped: here it is the squared error of the latents.
"""

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Loss, Network, State
from ditune.objectives.flow_base import Targets, rms
from ditune.objectives.reflow import FromPairs
from ditune.objectives.variational_bound import mean_flat
from ditune.processes import FlowProcess, expanded
from ditune.rng import StepRandom

FIRST = ("student", "teacher", "none")


class FlowGuided(FromPairs):
    """One-step distillation, with a second term that the teacher's flow gives.

    Args:
        first: v_0: 'student' (its own, without gradient: the code of the paper), 'teacher' (the paper's text), or
            'none': without the second term, plain one-step distillation of the pairs.
        low, high: 1 - t, the length of the first of the two steps, is uniform between them; 0 < low <= high < 1.
        process, others: see `FromPairs`.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    start = 1.0  # time at which the student is asked

    def __init__(
        self, process: FlowProcess, first: str = "student", low: float = 0.2, high: float = 0.8, **others: object
    ):
        super().__init__(process, **others)
        require(first in FIRST, "objective.first", first, f"Choose one of {', '.join(FIRST)}.")
        require(0 < low < 1, "objective.low", low, "Set it above 0 and below 1.")
        require(low <= high < 1, "objective.high", high, f"Set it to objective.low={low} or more, and below 1.")
        self.first, self.low, self.high = first, low, high

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss calls the teacher."""
        return super().asks_teacher or self.first != "none"

    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """z - x at t = 1, see `FlowObjective.targets`."""
        z, x, y = self.pair(x0, y, random, state, network.num_classes)
        t = torch.full((len(z),), self.start, device=z.device, dtype=z.dtype)
        return Targets(self.process.x_t(x, z, t), t, y, self.process.target(x, z, t))

    def two_steps(self, network: Network, z: Tensor, y: Tensor, length: Tensor, state: State) -> Tensor:
        """(1 - t) v_0 + t v_phi(x_t, t), the mean velocity of the teacher's two steps.

        Args:
            network: the student.
            z: (N, C, H, W) noise.
            y: (N,) labels.
            length: (N,) 1 - t.
            state: gives the pretrained network.

        Returns:
            (N, C, H, W), no gradient.
        """
        teacher = self.velocity_of(state, y, 1.0, network.num_classes)  # the guidance is in the flow that pairs made
        begin, part = torch.full_like(length, self.start), expanded(length, z)
        with torch.no_grad():
            v0 = teacher(z, begin) if self.first == "teacher" else self.process.velocity(network, z, begin, y)
            return part * v0 + (1 - part) * teacher(z - part * v0, 1 - length)

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Loss:
        """The sum of the two squared errors, see `Objective.loss`."""
        pair = self.targets(network, *batch, random, state)
        parts = {}
        if self.first != "none":
            z = random.normal("noise", pair.x_t.shape[1:]).to(pair.x_t)
            length = self.low + (self.high - self.low) * random.uniform("length").to(pair.t)
            target = self.two_steps(network, z, pair.y, length, state)
            torch.clear_autocast_cache()  # of weights that were cast without a gradient, see flow_base.py
            parts["mse_guided"] = mean_flat((self.process.velocity(network, z, pair.t, pair.y) - target) ** 2)
        torch.clear_autocast_cache()
        velocity = self.process.velocity(network, pair.x_t, pair.t, pair.y)  # last: its routing is what balance= sees
        parts["mse"] = mean_flat((velocity - pair.target) ** 2)
        loss = sum(parts.values())  # (N,)
        parts |= {"loss": loss, "velocity_rms": rms(velocity), "target_rms": rms(pair.target)}
        return Loss(loss.mean(), {name: value.detach() for name, value in parts.items()}, pair.t)
