"""A diffusion network read as a flow on the diffusion's own path; the bridge and its name are ours.

x_t = alpha(t) x_0 + sigma(t) epsilon with t = 0 at the first timestep and t = 1 at the last, so the network is asked at
its own points. The velocity is v = dx/dt = alpha'(t) x_0 + sigma'(t) epsilon. Between two timesteps log alpha / sigma
is linear. Where sigma is 0, sigma' of a continuous schedule diverges: t = 0 is the first timestep, with sigma above 0.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ditune.processes.flow import FlowProcess, expanded
from ditune.processes.gaussian import GaussianProcess
from ditune.processes.schedules import Tables


class DiffusionPath(FlowProcess):
    """A flow along the path of a Gaussian diffusion.

    Args:
        diffusion: config of the diffusion that the network was trained on.
        **flow: arguments of `FlowProcess`; time_scale, data_at and sigma_min are not used.
    """

    def __init__(self, diffusion: dict, **flow: object):
        super().__init__(diffusion=diffusion, **flow)
        self.config = self.config | {"kind": "diffusion_path"}
        self.gaussian = GaussianProcess(**diffusion)
        alpha, sigma = self.gaussian.tables["alpha"].numpy(), self.gaussian.tables["sigma"].numpy()
        self.tables = Tables(log_ratio=np.log(alpha / sigma))  # descending

    def changed(self, **changes: object) -> "DiffusionPath":
        """A copy with other values of some arguments."""
        arguments = self.config | {"step_blocks": self.step_blocks} | changes
        return DiffusionPath(**{key: value for key, value in arguments.items() if key != "kind"})

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The schedule at times t (N,) in [0, 1].

        Returns:
            The fractional timestep, alpha, sigma, and their derivatives by t, (N,) each.
        """
        last = self.gaussian.steps - 1
        table = self.tables.placed("log_ratio", t.device, torch.float32)
        timestep = t.clamp(0, 1) * last
        before = timestep.long().clamp(max=last - 1)
        slope = table[before + 1] - table[before]
        ratio = table[before] + (timestep - before) * slope  # lambda = log alpha / sigma
        alpha, sigma = torch.sigmoid(2 * ratio).sqrt(), torch.sigmoid(-2 * ratio).sqrt()
        # d alpha = alpha sigma^2 d lambda and d sigma = -sigma alpha^2 d lambda, from alpha^2 + sigma^2 = 1
        speed = slope * last
        return timestep, alpha, sigma, alpha * sigma**2 * speed, -sigma * alpha**2 * speed

    def x_t(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # (N, C, H, W) x 2, (N,) -> (N, C, H, W)
        """alpha(t) x_0 + sigma(t) epsilon."""
        _, alpha, sigma, *_ = self.coefficients(t)
        return expanded(alpha, x0) * x0 + expanded(sigma, x0) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha'(t) x_0 + sigma'(t) epsilon, (N, C, H, W)."""
        *_, alpha_speed, sigma_speed = self.coefficients(t)
        return expanded(alpha_speed, x0) * x0 + expanded(sigma_speed, x0) * noise

    def velocity(self, network: Callable, x: Tensor, t: Tensor, y: Tensor, d: Tensor | None = None) -> Tensor:
        """alpha'(t) x_0 + sigma'(t) epsilon of the network's x_0 and epsilon, see `FlowProcess.velocity`."""
        step = () if self.step == "none" else (self.network_step(torch.zeros_like(t) if d is None else d),)
        timestep, alpha, sigma, alpha_speed, sigma_speed = (
            value if k == 0 else expanded(value, x) for k, value in enumerate(self.coefficients(t))
        )
        output = network(x, timestep, y, *step)[:, : x.shape[1]].to(x.dtype)
        if self.gaussian.prediction == "v":
            x0, epsilon = alpha * x - sigma * output, sigma * x + alpha * output
        elif self.gaussian.prediction == "x0":
            x0, epsilon = output, (x - alpha * output) / sigma
        else:
            x0, epsilon = (x - sigma * output) / alpha, output
        return alpha_speed * x0 + sigma_speed * epsilon

    def part(self, time: Tensor) -> Tensor:  # (N,) -> (N,) in [0, 1]
        """Part of the process of the network's time: 0 = data, 1 = noise."""
        return time / (self.gaussian.steps - 1)
