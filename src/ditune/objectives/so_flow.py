"""SoFlow (Luo et al. 2025, arXiv 2512.15657): the solution f(x_t, t, s) of the flow's equation, no derivatives.

f(x_t, t, s) = x_t - (t - s) u(x_t, t, t - s) should equal f(x_l, l, s) from the point x_l = x_t + (l - t) v of the
path at l = t + (s - t) r, near t. Divided by t - s this is alpha-Flow's equation with alpha = r
(objectives/alpha_flow.py):

    u(x_t, t, t - s) = r v + (1 - r) sg u(x_l, l, l - s)

SoFlow differs from alpha-Flow in three ways: r falls exponentially, t and s have different distributions, and the
error has another weight.
"""

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, State
from ditune.objectives.flow_base import logit_normal
from ditune.objectives.flow_map import FlowMap
from ditune.processes import FlowProcess
from ditune.rng import StepRandom


class SoFlow(FlowMap):
    """Consistency of the solution between t and a point that approaches t during the training.

    Args:
        first_ratio, last_ratio: r at the first and the last step, 0 < last_ratio <= first_ratio <= 1.
        mean, std: t is sigmoid(mean + std z).
        end_mean, end_std: s is sigmoid(end_mean + end_std z), and t at most.
        power, eps: see `FlowMap`.
        process, others: see `FlowMap`.

    Raises:
        UserError: a number out of range.
    """

    scheduled = True

    def __init__(
        self,
        process: FlowProcess,
        first_ratio: float = 0.1,
        last_ratio: float = 2e-3,
        mean: float = 0.2,
        std: float = 0.8,
        end_mean: float = -1.0,
        end_std: float = 0.8,
        power: float = 0.5,
        eps: float = 1e-2,
        **others: float,
    ):
        super().__init__(process, mean=mean, std=std, power=power, eps=eps, **others)
        require(0 < first_ratio <= 1, "objective.first_ratio", first_ratio, "Set it above 0 and to 1 at most.")
        remedy = f"Set it above 0 and to objective.first_ratio={first_ratio} at most."
        require(0 < last_ratio <= first_ratio, "objective.last_ratio", last_ratio, remedy)
        require(end_std > 0, "objective.end_std", end_std, "Set it above 0.")
        self.first_ratio, self.last_ratio, self.end_mean, self.end_std = first_ratio, last_ratio, end_mean, end_std

    def scale(self, state: State) -> float:
        """r, exponentially from `first_ratio` to `last_ratio`; see `FlowMap.scale`."""
        return self.first_ratio * (self.last_ratio / self.first_ratio) ** (state.step / state.max_steps)

    def sample_interval(self, random: StepRandom) -> tuple[Tensor, Tensor]:  # (N,), (N,) float64
        """t and d = t - s of each sample, see `FlowMap.sample_interval`."""
        t = logit_normal(random.uniform("t"), self.mean, self.std)
        s = torch.minimum(logit_normal(random.uniform("r"), self.end_mean, self.end_std), t)
        jumps = random.uniform("jump") < self.share
        return t, torch.where(jumps, t - s, 0.0)

    def mean_velocity(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """r v + (1 - r) u(x_l, l, l - s), see `FlowMap.mean_velocity`."""
        return self.two_parts(network, x_t, v, t, d, y, self.scale(state))
