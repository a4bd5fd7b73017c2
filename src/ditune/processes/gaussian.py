"""The Gaussian diffusion process q(x_t | x_0), and how a network's output is read as p(x_{t-1} | x_t).

Ho et al. 2020 (arXiv 2006.11239, "DDPM"), Nichol & Dhariwal 2021 (arXiv 2102.09672, "IDDPM"), Salimans & Ho 2022
(arXiv 2202.00512, "v"). With alpha_bar = prod (1 - beta):  x_t = alpha x_0 + sigma epsilon,  alpha = sqrt(alpha_bar),
sigma = sqrt(1 - alpha_bar).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditune.errors import UserError, require
from ditune.processes.schedules import BETAS, Tables, kept_timesteps, respaced_betas

PREDICTIONS = ("epsilon", "x0", "v")
VARIANCES = ("learned_range", "fixed_large", "fixed_small")


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) as a network's output gives it, with the predicted x_0 and noise."""

    mean: Tensor  # (N, C, H, W)
    log_variance: Tensor  # (N, C, H, W), or (N, 1, 1, 1) if it is fixed
    x0: Tensor  # (N, C, H, W)
    epsilon: Tensor  # (N, C, H, W)


class GaussianProcess:
    """A diffusion process of T timesteps, or of fewer if it is respaced; t = 0 is nearest to the data.

    Args:
        schedule: 'linear' or 'cosine'.
        timesteps: T of the full process, with which the network is trained.
        prediction: the network's target: 'epsilon', 'x0', or 'v' = alpha epsilon - sigma x_0.
        variance: of p(x_{t-1} | x_t). 'learned_range' (2C output channels) interpolates between the two fixed ones.
        respacing: timesteps that are kept, see `kept_timesteps`.

    In all methods t (N,) int64 counts the kept timesteps; `network_time(t)` is the network's input.

    Raises:
        UserError: an unknown name, fewer than one timestep, or a respacing that does not fit.
    """

    def __init__(
        self,
        schedule: str = "linear",
        timesteps: int = 1000,
        prediction: str = "epsilon",
        variance: str = "learned_range",
        respacing: str = "",
    ):
        for name, value, known in [
            ("schedule", schedule, BETAS),
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, VARIANCES),
        ]:
            require(value in known, f"objective.process.{name}", value, f"Choose one of {', '.join(known)}.")
        require(timesteps >= 1, "objective.process.timesteps", timesteps, "Set it to 1 or more.")
        self.config = {
            "schedule": schedule,
            "timesteps": timesteps,
            "prediction": prediction,
            "variance": variance,
            "respacing": respacing,
        }
        self.timesteps, self.prediction, self.variance = timesteps, prediction, variance
        self._respaced: dict[str, GaussianProcess] = {}
        kept = kept_timesteps(respacing, timesteps)
        full_betas = BETAS[schedule](timesteps)
        if full_betas.max() >= 1:
            raise UserError(
                f"objective.process.timesteps is {timesteps}, and its {schedule} schedule has a beta of 1 or more. "
                "Set it to 21 or more."
            )
        betas = respaced_betas(full_betas, kept)
        self.tables = Tables(timestep_map=kept, **_gaussian_tables(betas))
        self.timestep_map = self.tables["timestep_map"]  # (T,) int64

    @property
    def steps(self) -> int:
        """Number of kept timesteps, at most `timesteps`."""
        return len(self.timestep_map)

    def respaced(self, respacing: str) -> "GaussianProcess":
        """The same process with other kept timesteps, counted on the full process; see `kept_timesteps`."""
        if respacing not in self._respaced:  # its tables then stay on the device from one batch of images to the next
            self._respaced[respacing] = GaussianProcess(**{**self.config, "respacing": respacing})
        return self._respaced[respacing]

    @property
    def length(self) -> int:
        """Length of the network's time, for parts of the process."""
        return self.timesteps

    @property
    def network(self) -> dict[str, bool]:
        """Arguments that the process needs in its network's constructor: none, `learn_sigma` is set by the user."""
        return {}

    def in_steps(self, steps: int) -> "GaussianProcess":
        """The same process for sampling in `steps` steps, which include the first and the last timestep.

        A stride ("ddim25") would begin at t = 960, but pure noise is not distributed as x_960; KID was 0.27 instead of
        0.21 (docs/results/base_network.md).

        Raises:
            UserError: `steps` is not between 1 and `timesteps`.
        """
        require(1 <= steps <= self.timesteps, "steps", steps, f"Set it between 1 and {self.timesteps}.")
        return self.respaced(str(steps))

    def bind(self, network: Callable) -> Callable:
        """The network as samplers call it: (x, network time, y) -> raw output."""
        return network

    def network_time(self, t: Tensor) -> Tensor:  # (N,) -> (N,) in 0..timesteps-1
        """The full process's timestep of each kept timestep, the network's input."""
        return self.tables.placed("timestep_map", t.device, torch.int64)[t]

    def part(self, time: Tensor) -> Tensor:  # (N,) -> (N,) in [0, 1]
        """Part of the process of the network's time: 0 = data, 1 = noise."""
        return time / self.timesteps

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:  # (N,) -> (N, 1, 1, 1)
        """Value of the table `name` at each sample's timestep, in the device and dtype of `like`."""
        return self.tables.at(name, t, like)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma epsilon (DDPM eq. 4).

        Args:
            x0: (N, C, H, W) data.
            t: (N,) int64 kept timesteps.
            noise: (N, C, H, W) standard normal.

        Returns:
            (N, C, H, W).
        """
        return self.at("alpha", t, x0) * x0 + self.at("sigma", t, x0) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7).

        Args:
            x0: (N, C, H, W) data, or its prediction.
            x_t: (N, C, H, W) noisy data.
            t: (N,) int64 kept timesteps.

        Returns:
            Mean (N, C, H, W), variance (N, 1, 1, 1), and the variance's clipped logarithm (N, 1, 1, 1).
        """
        mean = self.at("posterior_mean_coef1", t, x_t) * x0 + self.at("posterior_mean_coef2", t, x_t) * x_t
        return (
            mean,
            self.at("posterior_variance", t, x_t),
            self.at("posterior_log_variance_clipped", t, x_t),
        )

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The network's target at x_t = q_sample(x0, t, noise), (N, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        return self.at("alpha", t, x0) * noise - self.at("sigma", t, x0) * x0  # v, arXiv 2202.00512

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a network's output into prediction and variance.

        Args:
            output: raw network output, (N, 2C, H, W) for 'learned_range' and (N, C, H, W) otherwise.
            x_t: (N, C, H, W) input of the network.

        Returns:
            The prediction (N, C, H, W), and for 'learned_range' the variance's fraction in [-1, 1], (N, C, H, W), else
            None.

        Raises:
            UserError: the number of output channels does not suit the process's variance.
        """
        channels, learned = x_t.shape[1], self.variance == "learned_range"
        if output.shape[1] != channels * (1 + learned):
            raise UserError(
                f"The network has {output.shape[1]} output channels for {channels} input channels, which does not suit "
                f"objective.process.variance={self.variance}. Set variance=learned_range for networks with "
                "learn_sigma=true, and a fixed variance otherwise."
            )
        output = output.to(x_t.dtype)  # the step is computed in full precision, whatever the network ran in
        return (output[:, :channels], output[:, channels:]) if learned else (output, None)

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor, clip: float = 0.0) -> Prediction:
        """Read the network's output at x_t as p(x_{t-1} | x_t).

        Args:
            output: raw network output, (N, 2C, H, W) for 'learned_range' and (N, C, H, W) otherwise.
            x_t: (N, C, H, W).
            t: (N,) int64 kept timesteps.
            clip: clamp the predicted x_0 to [-clip, clip]; 0 = off. 1 suits pixels in [-1, 1].
        """
        predicted, fraction = self.split(output, x_t)
        x0 = self._x0(predicted, x_t, t)
        x0 = x0.clamp(-float(clip), float(clip)) if clip else x0
        mean, _, _ = self.q_posterior(x0, x_t, t)
        epsilon = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - x0
        epsilon = epsilon / self.at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return Prediction(mean, self._log_variance(fraction, x_t, t), x0, epsilon)

    def _x0(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "x0":
            return predicted
        if self.prediction == "v":  # v, appendix D: x_0 = alpha x_t - sigma v
            return self.at("alpha", t, x_t) * x_t - self.at("sigma", t, x_t) * predicted
        recip, recipm1 = self.at("sqrt_recip_alphas_cumprod", t, x_t), self.at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return recip * x_t - recipm1 * predicted  # DDPM eq. 15: x_0 = (x_t - sigma epsilon) / alpha

    def _log_variance(self, fraction: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        if fraction is None:
            return self.at(f"{self.variance}_log_variance", t, x_t)
        log_beta = self.at("log_betas", t, x_t)
        log_beta_tilde = self.at("posterior_log_variance_clipped", t, x_t)
        share = (fraction + 1) / 2  # IDDPM eq. 15, whose v is mapped from [-1, 1]
        return share * log_beta + (1 - share) * log_beta_tilde


def _gaussian_tables(betas: np.ndarray) -> dict[str, np.ndarray]:  # (T,) each, float64
    alphas_cumprod = np.cumprod(1 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    alphas_cumprod_next = np.append(alphas_cumprod[1:], 0.0)
    posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)  # DDPM eq. 7
    # The posterior variance is 0 at t = 0, where its logarithm borrows the next one (a process of one step has none).
    borrowed = posterior_variance[1] if len(betas) > 1 else betas[0]
    posterior_log_variance_clipped = np.log(np.append(borrowed, posterior_variance[1:]))
    return {
        "betas": betas,
        "log_betas": np.log(betas),
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "alpha": np.sqrt(alphas_cumprod),
        "alpha_prev": np.sqrt(alphas_cumprod_prev),
        "alpha_next": np.sqrt(alphas_cumprod_next),
        "sigma": np.sqrt(1 - alphas_cumprod),
        "sigma_next": np.sqrt(1 - alphas_cumprod_next),
        "variance_prev": 1 - alphas_cumprod_prev,
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": posterior_log_variance_clipped,
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
        "fixed_small_log_variance": posterior_log_variance_clipped,
        "fixed_large_log_variance": np.log(np.append(borrowed, betas[1:])),
    }
