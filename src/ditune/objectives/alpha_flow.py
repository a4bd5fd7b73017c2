"""alpha-Flow (Zhang et al. 2025, arXiv 2510.20771): from flow matching over shortcuts to MeanFlow by one number.

A step from t to r = t - d is cut at s = t - alpha d. Its mean velocity is that of its two parts, weighted by length:

    u(x_t, t, d) = alpha u(x_t, t, alpha d) + (1 - alpha) u(x_s, s, (1 - alpha) d)
    with x_s = x_t - alpha d u(x_t, t, alpha d).

alpha-Flow puts the path's own velocity v = epsilon - x_0 for the first part's, and divides the error by alpha:

    target = alpha v + (1 - alpha) sg u(x_s, s, (1 - alpha) d),    x_s = x_t - alpha d v

- alpha = 1: target = v, flow matching (on whole trajectories: the network is told d).
- alpha = 1/2: the target of shortcut models, (v1 + v2) / 2 over two steps of d/2, when the first part is the network's,
  v1 = u(x_t, t, d/2), and not the path's; where the network is right about the path (v1 = v) they are equal.
- alpha -> 0: along the path with r fixed, u(x_s, s, (1 - alpha) d) = u - alpha d du/dt + O(alpha^2), so
  (target - u) / alpha = v - d du/dt - u + O(alpha): the error of MeanFlow, whose target is v - d du/dt.
"""

import math

from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Network, State
from ditune.objectives.mean_flow import MeanFlow
from ditune.processes import FlowProcess


class AlphaFlow(MeanFlow):
    """alpha falls from 1 to 0 along a sigmoid in the middle of the training; below `smallest` MeanFlow takes over.

    Args:
        begin, end: shares of the training between which alpha falls.
        temperature: steepness of the sigmoid; the fall is centred between `begin` and `end`.
        smallest: alpha below this is 0, above 1 minus this it is 1.
        alpha: a constant in (0, 1] instead of the fall; None = the fall.
        process, others: see `FlowMap`.
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
        if not 0 <= begin < end <= 1 or not 0 < smallest < 0.5 or (alpha is not None and not 0 < alpha <= 1):
            raise UserError("alpha cannot fall so. Set 0 <= begin < end <= 1, smallest below 0.5 and alpha in (0, 1].")
        self.begin, self.end, self.temperature = begin, end, temperature
        self.smallest, self.constant = smallest, alpha

    def alpha(self, state: State) -> float:
        if self.constant is not None:
            return self.constant
        progress = (state.step / state.max_steps - self.begin) / (self.end - self.begin)
        alpha = 1 / (1 + math.exp(self.temperature * (progress - 0.5)))
        return 1.0 if alpha > 1 - self.smallest else 0.0 if alpha < self.smallest else alpha

    def scale(self, state: State) -> float:
        return self.alpha(state) or 1.0

    def mean_velocity(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, state: State
    ) -> Tensor:
        alpha = self.alpha(state)
        if alpha == 0:
            return super().mean_velocity(network, x_t, v, t, d, y, state)
        return self.two_parts(network, x_t, v, t, d, y, alpha)
