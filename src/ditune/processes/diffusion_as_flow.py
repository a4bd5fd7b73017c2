"""A diffusion network read as a flow: the same points in other coordinates, so nothing has to be learned anew.

With a = 1 - t and b = t, the flow's point x_t = a x_0 + b epsilon is n (alpha x_0 + sigma epsilon): the diffusion's
point times n = sqrt(a^2 + b^2), at the timestep with alpha / sigma = a / b. The velocity is epsilon - x_0.
"""

import numpy as np
import torch
from torch import Tensor

from ditune.processes.gaussian import GaussianProcess
from ditune.processes.schedules import Tables


class DiffusionAsFlow:
    """Inputs and velocities of a flow for a network that was trained on a Gaussian diffusion.

    Timesteps between two of the schedule are interpolated. A t beyond the schedule's ends is clamped to the end. Near
    t = 1 the x_0 of an epsilon network is inaccurate, since its error is divided by alpha; networks that predict v or
    x_0 have no such problem.

    Args:
        process: the diffusion that the network was trained on.
    """

    def __init__(self, process: GaussianProcess):
        self.process = process
        alpha, sigma = process.tables["alpha"].numpy(), process.tables["sigma"].numpy()
        self.tables = Tables(log_ratio=np.log(sigma / alpha))  # ascending: log b / a at every timestep

    def to_diffusion_time(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The diffusion's input that corresponds to a point of the flow.

        Args:
            x: (N, C, H, W) point of the flow.
            t: (N,) its time in [0, 1].

        Returns:
            The diffusion's x (N, C, H, W), its fractional timestep (N,), alpha and sigma (N, 1, 1, 1) there.
        """
        table = self.tables.placed("log_ratio", t.device, torch.float32)
        ratio = torch.logit(t.clamp(1e-9, 1 - 1e-7)).clamp(table[0], table[-1])
        after = torch.searchsorted(table, ratio).clamp(1, len(table) - 1)
        share = (ratio - table[after - 1]) / (table[after] - table[after - 1])
        timestep = after - 1 + share
        sigma = (torch.sigmoid(2 * ratio) ** 0.5).to(x).view(-1, 1, 1, 1)
        alpha = (torch.sigmoid(-2 * ratio) ** 0.5).to(x).view(-1, 1, 1, 1)
        norm = ((1 - t) ** 2 + t**2).sqrt().to(x).view(-1, 1, 1, 1)
        return x / norm, timestep, alpha, sigma

    def velocity(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """epsilon - x_0 of a prediction.

        Args:
            output: (N, C, H, W) prediction of the network.
            x: (N, C, H, W) point of the diffusion.
            alpha, sigma: (N, 1, 1, 1) at its timestep.

        Returns:
            (N, C, H, W).
        """
        if self.process.prediction == "v":  # x_0 = alpha x - sigma v, epsilon = sigma x + alpha v
            return (sigma - alpha) * x + (sigma + alpha) * output
        if self.process.prediction == "x0":  # epsilon = (x - alpha x_0) / sigma
            return (x - alpha * output) / sigma - output
        return output - (x - sigma * output) / alpha  # x_0 = (x - sigma epsilon) / alpha
