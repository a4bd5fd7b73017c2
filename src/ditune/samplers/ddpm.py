"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ditune.processes import GaussianProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn, at_time


class DDPM(Sampler):
    """x_{t-1} ~ p(x_{t-1} | x_t) at every timestep, from noise to data.

    Args:
        clip: clamp the predicted x_0 to [-clip, clip]; 0 = off. Set it to the autoencoder's scale for pixels.
    """

    kind = "DDPM"
    parameters = ("clip",)
    process = GaussianProcess

    def __init__(self, clip: float = 0.0):
        self.clip = clip

    def walk(self, model_fn: ModelFn, process: GaussianProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Take the process's steps, see `Sampler.walk`."""
        for step in reversed(range(process.steps)):
            t, at = torch.full((len(x),), step, device=x.device), int(process.timestep_map[step])
            prediction = process.predict(at_time(model_fn, at)(x, process.network_time(t)), x, t, self.clip)
            x = prediction.mean
            if step > 0:
                x = x + (0.5 * prediction.log_variance).exp() * noise().to(x)  # algorithm 2, line 4
            yield at, x, prediction.x0
