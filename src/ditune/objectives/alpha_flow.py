"""alpha-Flow (Zhang et al. 2025, arXiv 2510.20771): from flow matching over shortcuts to MeanFlow by one number.

A step from t to r = t - d is cut at s = t - alpha d. Its mean velocity is that of its two parts, weighted by length:

    u(x_t, t, d) = alpha u(x_t, t, alpha d) + (1 - alpha) u(x_s, s, (1 - alpha) d)
    with x_s = x_t - alpha d u(x_t, t, alpha d).

alpha-Flow replaces the first part's mean velocity by the path's velocity v = epsilon - x_0, and divides the error by
alpha:

    target = alpha v + (1 - alpha) sg u(x_s, s, (1 - alpha) d),    x_s = x_t - alpha d v

- alpha = 1: target = v, flow matching (on whole trajectories: the network is conditioned on d).
- alpha = 1/2: the target of shortcut models, (v1 + v2) / 2 over two steps of d/2, when v1 = u(x_t, t, d/2) is the
  network's and not the path's. The two are equal if the network is exact (v1 = v).
- alpha -> 0: along the path with r fixed, u(x_s, s, (1 - alpha) d) = u - alpha d du/dt + O(alpha^2), so
  (target - u) / alpha = v - d du/dt - u + O(alpha): the error of MeanFlow, whose target is v - d du/dt.
"""

import math

from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, State
from ditune.objectives.mean_flow import MeanFlow
from ditune.processes import FlowProcess


class AlphaFlow(MeanFlow):
    """The mean velocity of two parts of a step, with alpha falling from 1 to 0 along a sigmoid over the training.

    Below `smallest`, alpha is 0 and the target is MeanFlow's.

    Args:
        begin, end: alpha falls between these shares of the training, 0 <= begin < end <= 1.
        temperature: steepness of the sigmoid, which is centred between `begin` and `end`.
        smallest: alpha below this is 0, and above 1 - smallest it is 1.
        alpha: a constant in (0, 1] instead of the schedule; None = the schedule.
        process, others: see `FlowMap`.

    Raises:
        UserError: a number out of range.
    """

    scheduled = True

    def __init__(
        self,
        process: FlowProcess,
        begin: float = 0.0,
        end: float = 1.0,
        temperature: float = 25.0,
        smallest: float = 5e-3,
        alpha: float | None = None,
        **others: float,
    ):
        super().__init__(process, **others)
        require(0 <= begin < 1, "objective.begin", begin, "Set it to 0 or more and below 1.")
        require(begin < end <= 1, "objective.end", end, f"Set it above objective.begin={begin}, to 1 at most.")
        require(0 < smallest < 0.5, "objective.smallest", smallest, "Set it above 0 and below 0.5.")
        remedy = "Set it above 0 and to 1 at most, or to null."
        require(alpha is None or 0 < alpha <= 1, "objective.alpha", alpha, remedy)
        self.begin, self.end, self.temperature = begin, end, temperature
        self.smallest, self.constant = smallest, alpha

    def alpha(self, state: State) -> float:
        """alpha in [0, 1] at this step; 0 means MeanFlow."""
        if self.constant is not None:
            return self.constant
        progress = (state.step / state.max_steps - self.begin) / (self.end - self.begin)
        alpha = 1 / (1 + math.exp(self.temperature * (progress - 0.5)))
        return 1.0 if alpha > 1 - self.smallest else 0.0 if alpha < self.smallest else alpha

    def scale(self, state: State) -> float:
        """alpha, and 1 for MeanFlow, whose error is not divided; see `FlowMap.scale`."""
        return self.alpha(state) or 1.0

    def mean_velocity(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """alpha v + (1 - alpha) u(x_s, s, (1 - alpha) d), or MeanFlow's; see `FlowMap.mean_velocity`."""
        alpha = self.alpha(state)
        if alpha == 0:
            return super().mean_velocity(network, x_t, v, t, d, y, state)
        return self.two_parts(network, x_t, v, t, d, y, alpha)
