"""Denoising diffusion implicit models (Song et al. 2020, arXiv 2010.02502)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ditune.errors import require
from ditune.processes import GaussianProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn, at_time


class DDIM(Sampler):
    """Steps along the predicted noise, from noise to data; deterministic at eta = 0.

    Args:
        eta: share of the ancestral sampler's randomness, 0..1 (eq. 16).
        clip: clamp the predicted x_0 to [-clip, clip]; 0 = off. Set it to the autoencoder's scale for pixels.

    Raises:
        UserError: eta is outside of 0..1.
    """

    kind = "DDIM"
    parameters = ("eta", "clip")
    process = GaussianProcess

    def __init__(self, eta: float = 0.0, clip: float = 0.0):
        require(0 <= eta <= 1, "sampler.sampler.eta", eta, "Set it between 0 and 1.")
        self.eta, self.clip = eta, clip

    def walk(self, model_fn: ModelFn, process: GaussianProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Take the process's steps, see `Sampler.walk`."""
        for step in reversed(range(process.steps)):
            t, at = torch.full((len(x),), step, device=x.device), int(process.timestep_map[step])
            prediction = process.predict(at_time(model_fn, at)(x, process.network_time(t)), x, t, self.clip)
            variance = self.eta**2 * process.at("posterior_variance", t, x)  # eq. 16, squared
            # A table gives 1 - alpha_bar: the difference taken in float32 can fall below the variance.
            direction = (process.at("variance_prev", t, x) - variance).sqrt()
            x = process.at("alpha_prev", t, x) * prediction.x0 + direction * prediction.epsilon  # eq. 12
            if self.eta > 0 and step > 0:
                x = x + variance.sqrt() * noise().to(x)
            yield at, x, prediction.x0

    @torch.inference_mode()
    def reverse(
        self,
        model_fn: ModelFn,
        process: GaussianProcess,
        x: Tensor,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:  # (N, C, H, W)
        """Invert the sampler at eta = 0: from data to the noise that it comes from (section 4.3, the ODE backwards).

        Args:
            model_fn: (x, time) -> raw output.
            process: with the number of steps to be taken.
            x: (N, C, H, W) data.
            on_step: called after every step with (timestep, x, predicted x_0).

        Returns:
            (N, C, H, W) noise.
        """
        for step in range(process.steps):
            t, at = torch.full((len(x),), step, device=x.device), int(process.timestep_map[step])
            prediction = process.predict(at_time(model_fn, at)(x, process.network_time(t)), x, t, self.clip)
            x = process.at("alpha_next", t, x) * prediction.x0 + process.at("sigma_next", t, x) * prediction.epsilon
            if on_step is not None:
                on_step(at, x, prediction.x0)
        return x
