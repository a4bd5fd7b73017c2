"""The variational bound's terms, in bits per dimension (Ho et al. 2020, arXiv 2006.11239, eq. 5 and 13)."""

import math

import torch
from torch import Tensor

from ditune.processes import GaussianProcess, Prediction

HALF_PIXEL = 1 / 255  # half the distance of two grey values in [-1, 1]


def mean_flat(x: Tensor) -> Tensor:  # (N, ...) -> (N,)
    """Mean of each sample."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise. Shapes broadcast."""
    log_ratio = log_variance1 - log_variance2
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Standard normal distribution function by a tanh (Page 1977), as in GELU's approximation; error below 4e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability in nats of grey values under N(mean, exp(log_scale)^2) (DDPM eq. 13).

    The darkest and the brightest grey value get the tails of the distribution. Shapes broadcast.

    Args:
        x: grey values in [-1, 1], in steps of 2/255.
        mean: of the Gaussian.
        log_scale: logarithm of its standard deviation.
    """
    below = approximate_normal_cdf((x - mean - HALF_PIXEL) * (-log_scale).exp())
    above = approximate_normal_cdf((x - mean + HALF_PIXEL) * (-log_scale).exp())
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def bound_term(process: GaussianProcess, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:  # (N,)
    """L_{t-1} of DDPM eq. 5 in bits per dimension: a KL divergence, and at t = 0 the negative log-likelihood of x_0.

    Args:
        process: the diffusion process.
        prediction: p(x_{t-1} | x_t).
        x0: (N, C, H, W) data.
        x_t: (N, C, H, W) noisy data.
        t: (N,) int64 kept timesteps.
    """
    true_mean, _, true_log_variance = process.q_posterior(x0, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, prediction.mean, prediction.log_variance)
    nll = -discretized_gaussian_log_likelihood(x0, prediction.mean, 0.5 * prediction.log_variance)
    return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)


def prior_term(process: GaussianProcess, x0: Tensor) -> Tensor:  # (N,)
    """L_T of DDPM eq. 5 in bits per dimension: the KL divergence of x_T from standard normal noise.

    Args:
        process: the diffusion process.
        x0: (N, C, H, W) data.
    """
    last = torch.full((len(x0),), process.steps - 1, device=x0.device)
    mean = process.at("alpha", last, x0) * x0
    zero = torch.zeros_like(x0)
    return mean_flat(normal_kl(mean, process.at("log_one_minus_alphas_cumprod", last, x0), zero, zero)) / math.log(2)
