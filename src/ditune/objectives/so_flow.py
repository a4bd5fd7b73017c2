"""SoFlow (Luo et al. 2025, arXiv 2512.15657): the solution f(x_t, t, s) of the flow's equation, no derivatives.

f(x_t, t, s) = x_t - (t - s) u(x_t, t, t - s) should equal f(x_l, l, s) from the path's own point x_l = x_t + (l - t) v
at l = t + (s - t) r, near t. Divided by t - s that is alpha-Flow's equation with alpha = r (objectives/alpha_flow.py):

    u(x_t, t, t - s) = r v + (1 - r) sg u(x_l, l, l - s)

What is its own: r shrinks exponentially, the ends have distributions of their own, and the error's weight.
"""

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Draws, Network, State
from ditune.objectives.flow_base import logit_normal
from ditune.objectives.flow_map import FlowMap
from ditune.processes import FlowProcess


class SoFlow(FlowMap):
    """Consistency of the solution between t and a point that comes ever nearer to it.

    Args:
        first_ratio, last_ratio: r at the beginning and at the end of the training, in (0, 1].
        mean, std: of sigmoid(mean + std z), which t is drawn from.
        end_mean, end_std: likewise of s; s never exceeds t.
        process, others: see `FlowMap`.
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
        if not 0 < last_ratio <= first_ratio <= 1 or end_std <= 0:
            raise UserError("r cannot shrink so. Set 0 < last_ratio <= first_ratio <= 1, and end_std above 0.")
        self.first_ratio, self.last_ratio, self.end_mean, self.end_std = first_ratio, last_ratio, end_mean, end_std

    def scale(self, state: State) -> float:
        """r, exponentially from the first to the last."""
        return self.first_ratio * (self.last_ratio / self.first_ratio) ** (state.step / state.max_steps)

    def draw_ends(self, draws: Draws) -> tuple[Tensor, Tensor]:
        t = logit_normal(draws.uniform("t"), self.mean, self.std)
        s = torch.minimum(logit_normal(draws.uniform("r"), self.end_mean, self.end_std), t)
        jumps = draws.uniform("jump") < self.share
        return t, torch.where(jumps, t - s, 0.0)

    def mean_velocity(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, state: State
    ) -> Tensor:
        return self.two_parts(network, x_t, v, t, d, y, self.scale(state))
