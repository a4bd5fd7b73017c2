"""Denoising diffusion implicit models (Song et al. 2020, arXiv 2010.02502)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import GaussianProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn


class DDIM(Sampler):
    """Walks from noise to data along the predicted noise; without randomness at eta = 0.

    Args:
        eta: share of an ancestral sampler's randomness, 0..1.
        clip: hold the predicted x_0 in [-clip, clip]; 0 = not. For pixels in [-1, 1] times a scale: that scale.

    Raises:
        UserError: eta lies outside 0..1.
    """

    kind = "DDIM"
    parameters = ("eta", "clip")
    process = GaussianProcess

    def __init__(self, eta: float = 0.0, clip: float = 0.0):
        if not 0 <= eta <= 1:
            raise UserError(
                f"DDIM's eta is a share of randomness, but is {eta}. Set sampler.sampler.eta between 0 and 1."
            )
        self.eta, self.clip = eta, clip

    def walk(self, model_fn: ModelFn, process: GaussianProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        for step in reversed(range(process.steps)):
            t = torch.full((len(x),), step, device=x.device)
            prediction = process.predict(model_fn(x, process.network_time(t)), x, t, self.clip)
            variance = self.eta**2 * process.at("posterior_variance", t, x)  # eq. 16, squared
            # A table gives 1 - alpha_bar: the difference taken in float32 can fall below the variance.
            direction = (process.at("variance_prev", t, x) - variance).sqrt()
            x = process.at("alpha_prev", t, x) * prediction.x0 + direction * prediction.epsilon  # eq. 12
            if self.eta > 0 and step > 0:
                x = x + variance.sqrt() * noise().to(x)
            yield int(process.timestep_map[step]), x, prediction.x0

    @torch.inference_mode()
    def reverse(
        self,
        model_fn: ModelFn,
        process: GaussianProcess,
        x: Tensor,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:  # (N, C, H, W)
        """Walk from data x (N, C, H, W) to the noise that makes them (section 4.3, the ODE run backwards; eta = 0)."""
        for step in range(process.steps):
            t = torch.full((len(x),), step, device=x.device)
            prediction = process.predict(model_fn(x, process.network_time(t)), x, t, self.clip)
            x = process.at("alpha_next", t, x) * prediction.x0 + process.at("sigma_next", t, x) * prediction.epsilon
            if on_step is not None:
                on_step(int(process.timestep_map[step]), x, prediction.x0)
        return x
