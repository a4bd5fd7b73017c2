"""A diffusion network read as a flow: the same points in other coordinates, so that nothing has to be learned anew.

With a = 1 - t and b = t the flow's x_t = a x_0 + b epsilon is the diffusion's alpha x_0 + sigma epsilon times
n = sqrt(a^2 + b^2) at the timestep with alpha / sigma = a / b; and the velocity is epsilon - x_0.
"""

import numpy as np
import torch
from torch import Tensor

from ditune.processes.gaussian import GaussianProcess
from ditune.processes.schedules import Tables


class Diffused:
    """Questions and answers of a network that was trained on a Gaussian diffusion, in terms of the flow.

    Timesteps between two of the schedule are interpolated. Beyond its ends (t nearer to 0 or 1 than the schedule goes)
    the network is asked at the end. An epsilon network says little about x_0 near t = 1, where its error is divided by
    alpha; networks that predict v or x_0 have no such place.
    """

    def __init__(self, process: GaussianProcess):
        self.process = process
        alpha, sigma = process.tables["alpha"].numpy(), process.tables["sigma"].numpy()
        self.tables = Tables(log_ratio=np.log(sigma / alpha))  # ascending: log b / a at every timestep

    def question(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The diffusion's x (N, C, H, W), its timestep (N,), and alpha and sigma (N, 1, 1, 1) there."""
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
        """epsilon - x_0 of what the network says at the diffusion's x."""
        if self.process.prediction == "v":  # x_0 = alpha x - sigma v, epsilon = sigma x + alpha v
            return (sigma - alpha) * x + (sigma + alpha) * output
        if self.process.prediction == "x0":
            return (x - alpha * output) / sigma - output
        return output - (x - sigma * output) / alpha
