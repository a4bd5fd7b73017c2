"""MeanFlow (Geng et al. 2025, arXiv 2505.13447)."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditune.objectives.base import Network, State
from ditune.objectives.flow_map import FlowMap
from ditune.processes import expanded


class MeanFlow(FlowMap):
    """The MeanFlow identity u = v - (t - r) du/dt, the derivative of (t - r) u = integral of v along the path.

    The total derivative du/dt = v grad_x u + d/dt u, with the step's end r fixed, is one Jacobian-vector product in
    forward mode. Only attention's plain form supports it, and compiled blocks run eagerly for it.
    """

    any_path = True
    forward_mode = True

    def mean_velocity(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """v - d du/dt, see `FlowMap.mean_velocity`."""
        return v - expanded(d, v) * self.derivative(network, x_t, v, t, d, y)

    @torch.no_grad()
    def derivative(self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor) -> Tensor:
        """du/dt (N, C, H, W) along the path: dx/dt = v, and dd/dt = 1 because r is fixed.

        Args:
            network, x_t, v, t, d, y: see `FlowMap.mean_velocity`.
        """

        def u(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
            return self.process.velocity(network, x, t, y, d)

        one = torch.ones_like(t)
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            _, derivative = torch.func.jvp(u, (x_t, t, d), (v, one, one))
        return derivative
