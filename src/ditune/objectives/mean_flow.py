"""MeanFlow (Geng et al. 2025, arXiv 2505.13447), and improved MeanFlow's regression (arXiv 2512.02012)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditune.errors import require
from ditune.objectives.base import Network, State
from ditune.objectives.flow_base import called_rows, with_scale
from ditune.objectives.flow_map import FlowMap
from ditune.processes import FlowProcess, expanded
from ditune.rng import StepRandom

JVP, DIFFERENCE = "jvp", "difference"  # forms of the derivative
TANGENTS = ("path", "network")


class MeanFlow(FlowMap):
    """The MeanFlow identity u = v - (t - r) du/dt, the derivative of (t - r) u = integral of v along the path.

    The total derivative du/dt = v grad_x u + d/dt u, with the step's end r fixed, is one of two forms:

    - 'jvp': one Jacobian-vector product in forward mode. Only attention's plain form supports it, and compiled blocks
      run eagerly for it.
    - 'difference': two calls of the network at t + h and t - h, of second order in h. It works with fused attention,
      compiled blocks, every method and `trainer=fsdp`.

    Improved MeanFlow regresses V = u + (t - r) sg(du/dt) on v, with du/dt along the network's own velocity u(x_t, t, t)
    in place of the sample's v. V - v and u - (v - (t - r) sg(du/dt)) are equal, so only this tangent differs.

    With `control` guidance is an input, as in improved MeanFlow's code (github.com/Lyy-iiis/imeanflow, MIT): where the
    network is given w it learns the velocity v + (1 - 1/w) (u(x_t, t, 0 | c, w) - u(x_t, t, 0 | null class, 1)). A
    network that has learned it is v_null + w (v_c - v_null), plain guidance. The code's guidance interval as a second
    input is not here.

    Args:
        derivative: form of du/dt, 'jvp' or 'difference'.
        difference_step: h of 'difference', in time. A sample's h is at most its d, so that no step becomes negative.
        tangent: direction of du/dt: 'path', the (guided) velocity of the sample, or 'network', improved MeanFlow's.
        control: the network is given w = guidance^z, z uniform in [0, 1] for each sample, and 1 with the null class,
            whose target is plain. Sampling chooses it by `sampler.guidance_input`. With guidance 1 training is that
            without `control`, to the bit.
        process, others: see `FlowMap`.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    any_path = True

    def __init__(
        self,
        process: FlowProcess,
        derivative: str = JVP,
        difference_step: float = 1e-4,
        tangent: str = "path",
        control: bool = False,
        **others: float,
    ):
        super().__init__(process, **others)
        if control:
            require(self.guidance >= 1, "objective.guidance", self.guidance, "With control, set it to 1 or more.")
        known = (JVP, DIFFERENCE)
        require(derivative in known, "objective.derivative", derivative, f"Choose one of {', '.join(known)}.")
        require(tangent in TANGENTS, "objective.tangent", tangent, f"Choose one of {', '.join(TANGENTS)}.")
        require(0 < difference_step < 1, "objective.difference_step", difference_step, "Set it above 0 and below 1.")
        self.forward_mode, self.difference_step, self.tangent = derivative == JVP, difference_step, tangent
        self.control = control

    @property
    def inputs(self) -> dict[str, Any]:
        """The process's, and w."""
        return super().inputs | ({"guided": True} if self.control else {})

    def scales(self, network: Network, y: Tensor, random: StepRandom) -> Tensor | None:  # (N,)
        """guidance^z, and 1 with the null class; see `FlowMap.scales`."""
        if not self.control:
            return None
        w = self.guidance ** random.uniform("w")  # log-uniform in [1, guidance]
        return torch.where(y == network.num_classes, 1.0, w.to(y.device, torch.float32))

    @torch.no_grad()
    def guided_target(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, y: Tensor, w: Tensor | None = None
    ) -> Tensor:
        """v + (1 - 1/w) (u(x_t, t, 0 | y, w) - u(x_t, t, 0 | null class, 1)), see `FlowMap.guided_target`."""
        if w is None:
            return super().guided_target(network, x_t, v, t, y)
        rows = (w != 1).nonzero()[:, 0]
        called = called_rows(rows)
        if len(called) == 0:
            return v
        x, time = x_t[called], t[called]
        null = torch.full_like(y[called], network.num_classes)
        difference = self.process.velocity(with_scale(network, w[called]), x, time, y[called])
        difference = difference - self.process.velocity(network, x, time, null)
        return v.index_copy(0, rows, v[rows] + expanded(1 - 1 / w[rows], v) * difference[: len(rows)])

    def mean_velocity(
        self, network: Callable, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """v - d du/dt, see `FlowMap.mean_velocity`."""
        tangent = v
        if self.tangent == "network":
            with torch.no_grad():
                tangent = self.process.velocity(network, x_t, t, y)  # u(x_t, t, t)
        return v - expanded(d, v) * self.derivative(network, x_t, tangent, t, d, y)

    @torch.no_grad()
    def derivative(self, network: Callable, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor) -> Tensor:
        """du/dt (N, C, H, W) along the path: dx/dt = v, and dd/dt = 1 because r is fixed.

        Args:
            network, x_t, v, t, d, y: see `FlowMap.mean_velocity`.
        """

        def u(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
            return self.process.velocity(network, x, t, y, d)

        if not self.forward_mode:
            return central_difference(u, x_t, v, t, d, self.difference_step)
        one = torch.ones_like(t)
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            _, derivative = torch.func.jvp(u, (x_t, t, d), (v, one, one))
        return derivative


def central_difference(u: Callable[..., Tensor], x: Tensor, v: Tensor, t: Tensor, d: Tensor, step: float) -> Tensor:
    """(u(x + h v, t + h, d + h) - u(x - h v, t - h, d - h)) / 2h, which is du/dt + O(h^2).

    Args:
        u: (x, t, d) -> (N, C, H, W).
        x: (N, C, H, W) point at t.
        v: (N, C, H, W) dx/dt.
        t: (N,) time. t + h may exceed 1, where the path goes on straight.
        d: (N,) step size above 0.
        step: h, or less for a sample whose d is smaller.

    Returns:
        (N, C, H, W).
    """
    h = d.clamp(max=step)  # (N,)
    moved = expanded(h, x) * v
    return (u(x + moved, t + h, d + h) - u(x - moved, t - h, d - h)) / expanded(2 * h, x)
