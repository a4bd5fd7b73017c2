"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ditune.processes import GaussianProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn


class DDPM(Sampler):
    """Walks from noise to data by drawing x_{t-1} from p(x_{t-1} | x_t).

    Args:
        clip: hold the predicted x_0 in [-clip, clip]; 0 = not. For pixels in [-1, 1] times a scale: that scale.
    """

    kind = "DDPM"
    parameters = ("clip",)
    process = GaussianProcess

    def __init__(self, clip: float = 0.0):
        self.clip = clip

    def walk(self, model_fn: ModelFn, process: GaussianProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        for step in reversed(range(process.steps)):
            t = torch.full((len(x),), step, device=x.device)
            prediction = process.predict(model_fn(x, process.network_time(t)), x, t, self.clip)
            x = prediction.mean
            if step > 0:
                x = x + (0.5 * prediction.log_variance).exp() * noise().to(x)
            yield int(process.timestep_map[step]), x, prediction.x0
