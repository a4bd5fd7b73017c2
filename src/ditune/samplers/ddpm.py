"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ditune.processes import GaussianProcess
from ditune.samplers.guidance import ModelFn


class DDPM:
    """Walks from noise to data by drawing x_{t-1} from p(x_{t-1} | x_t).

    Args:
        clip: hold the predicted x_0 in [-clip, clip]; 0 = not. For pixels in [-1, 1] times a scale: that scale.
    """

    process = GaussianProcess

    def __init__(self, clip: float = 0.0):
        self.clip = clip

    def check(self, process: GaussianProcess) -> None:
        """Any number of the process's timesteps will do."""

    @torch.inference_mode()
    def __call__(
        self,
        model_fn: ModelFn,
        process: GaussianProcess,
        x: Tensor,
        noise: Callable[[], Tensor],
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:  # (N, C, H, W)
        """Denoise x_T.

        Args:
            model_fn: (x, network time) -> raw output.
            process: its steps are the steps taken.
            x: (N, C, H, W) standard normal noise.
            noise: gives (N, C, H, W) standard normal noise; called at every step but the last.
            on_step: called after every step with (timestep of the network, x, predicted x_0).
        """
        for step in reversed(range(process.steps)):
            t = torch.full((len(x),), step, device=x.device)
            prediction = process.predict(model_fn(x, process.network_time(t)), x, t, self.clip)
            x = prediction.mean
            if step > 0:
                x = x + (0.5 * prediction.log_variance).exp() * noise().to(x)
            if on_step is not None:
                on_step(int(process.timestep_map[step]), x, prediction.x0)
        return x
