"""Weights of the squared error over the noise level, as Hang et al. 2023 (arXiv 2303.09556, section 3.4) compare them.

Each is a weight on the error of x_0, as a function of the signal-to-noise ratio; an error of what the network predicts
is first translated into one of x_0.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

# name: weight on the error of x_0 by SNR and gamma
WEIGHTS: dict[str, Callable] = {
    "x0": lambda snr, gamma: snr * 0 + 1,
    "epsilon": lambda snr, gamma: snr,
    "truncated_snr": lambda snr, gamma: snr.clip(min=1),  # arXiv 2202.00512, section 4
    "min_snr": lambda snr, gamma: snr.clip(max=gamma),
}


def gaussian_weights(weight: str, prediction: str, snr: np.ndarray, gamma: float) -> np.ndarray:
    """Of the squared error of a diffusion's prediction, which is that of x_0 times SNR ('epsilon') or SNR + 1 ('v')."""
    divisor = {"epsilon": snr, "x0": np.ones_like(snr), "v": snr + 1}[prediction]
    return WEIGHTS[weight](snr, gamma) / divisor


def flow_weights(weight: str, t: Tensor, gamma: float) -> Tensor:
    """Of the error of a flow's velocity: x_0 = x_t - t v gives d(x_0) = t d(v), and SNR = ((1 - t) / t)^2."""
    snr = ((1 - t) / t.clamp(min=1e-6)) ** 2
    return WEIGHTS[weight](snr, gamma) * t**2
