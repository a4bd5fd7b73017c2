"""What MeanFlow, alpha-Flow and SoFlow share: mean velocities over any step, learned from the straight paths alone.

u(x_t, t, d) is the mean velocity from t down to r = t - d. Some samples learn it for d > 0, the others flow matching.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Draws, Network, State, drop_labels
from ditune.objectives.flow_base import FlowObjective, Targets, logit_normal
from ditune.processes import FlowProcess, expanded


class FlowMap(FlowObjective):
    """A target for the mean velocity over a step, which a subclass gives.

    Args:
        process: the flow; its network is told steps, of any length (no `base_steps`).
        share: of samples that learn a step of d > 0, in [0, 1].
        mean, std: both ends of a step are drawn from sigmoid(mean + std z); the later one is t.
        guidance: classifier-free guidance of the velocity that is learned; 1 = none. Then none is needed for drawing.
        power, eps: the error e of a sample is weighted by (e + eps)^-power; 0 = not (2505.13447, section 4.3).
        label_drop: share of labels replaced by the null class.

    Raises:
        UserError: a number out of range, or a process whose network is not told every step.
    """

    def __init__(
        self,
        process: FlowProcess,
        share: float = 0.25,
        mean: float = -0.4,
        std: float = 1.0,
        guidance: float = 1.0,
        power: float = 1.0,
        eps: float = 1e-3,
        label_drop: float = 0.1,
    ):
        super().__init__(process, label_drop)
        if process.step != "size" or process.base_steps is not None:
            raise UserError(
                "The network must be told steps of any length. "
                "Set objective.process.step=size and objective.process.base_steps=null."
            )
        if not 0 <= share <= 1 or std <= 0 or power < 0 or eps <= 0:
            raise UserError("There is no such flow map. Set share in [0, 1], std and eps above 0, power to 0 or more.")
        self.share, self.mean, self.std = share, mean, std
        self.guidance, self.power, self.eps = guidance, power, eps

    def scale(self, state: State) -> float:
        """alpha: how far the target reaches along the step, in (0, 1]; its error is divided by it."""
        return 1.0

    @abstractmethod
    def mean_velocity(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """The target of u(x_t, t, d) for d > 0, of the path with velocity v; no gradient."""

    def draw_ends(self, draws: Draws) -> tuple[Tensor, Tensor]:  # (N,), (N,) float64
        """t and d of each sample."""
        ends = [logit_normal(draws.uniform(name), self.mean, self.std) for name in ("t", "r")]
        first, second = torch.stack(ends).amax(dim=0), torch.stack(ends).amin(dim=0)
        jumps = draws.uniform("jump") < self.share
        return torch.where(jumps, first, ends[0]), torch.where(jumps, first - second, 0.0)

    def targets(self, network: Network, x0: Tensor, y: Tensor, draws: Draws, state: State) -> Targets:
        t, d = (value.to(x0) for value in self.draw_ends(draws))
        noise = draws.normal("noise", x0.shape[1:]).to(x0)
        y = drop_labels(y, draws, self.label_drop, network.num_classes)
        x_t = self.process.x_t(x0, noise, t)
        v = self.guided_target(network, x_t, self.process.target(x0, noise), t, y)
        target, rows = v, (d > 0).nonzero()[:, 0]
        if len(rows):
            learned = self.mean_velocity(network, *(value[rows] for value in (x_t, v, t, d, y)), state)
            target = v.index_copy(0, rows, learned)
        return Targets(x_t, t, y, target, d)

    @torch.no_grad()
    def guided_target(self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """w v + (1 - w) u(x_t, t, 0 | no class) where a class is given (2505.13447, section 4.2)."""
        rows = (y != network.num_classes).nonzero()[:, 0]
        if self.guidance == 1 or len(rows) == 0:
            return v
        null = torch.full_like(y[rows], network.num_classes)
        unconditional = self.process.velocity(network, x_t[rows], t[rows], null)
        return v.index_copy(0, rows, self.guidance * v[rows] + (1 - self.guidance) * unconditional)

    def weights(self, mse: Tensor, targets: Targets, state: State) -> Tensor:  # (N,)
        scale = torch.where(targets.d > 0, self.scale(state), 1.0)
        return (mse.detach() / scale**2 + self.eps) ** -self.power / scale

    def two_parts(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, alpha: float
    ) -> Tensor:
        """alpha v + (1 - alpha) u(x_s, s, r): along the path's velocity to s = t - alpha d, and from there by u."""
        with torch.no_grad():
            x_s = x_t - expanded(alpha * d, x_t) * v
            rest = self.process.velocity(network, x_s, t - alpha * d, y, (1 - alpha) * d)
        return alpha * v + (1 - alpha) * rest
