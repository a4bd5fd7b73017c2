"""Weights of the squared error by noise level, as compared in Hang et al. 2023 (arXiv 2303.09556, section 3.4).

Each weight applies to the error of x_0 and is a function of the signal-to-noise ratio. The error of another prediction
is translated to the error of x_0 first.
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
    """Weights of a diffusion's squared error.

    The error of x_0 is the error of epsilon divided by SNR, or the error of v divided by SNR + 1.

    Args:
        weight: one of `WEIGHTS`.
        prediction: 'epsilon', 'x0' or 'v'.
        snr: (T,) signal-to-noise ratio.
        gamma: upper limit of 'min_snr'.

    Returns:
        (T,).
    """
    divisor = {"epsilon": snr, "x0": np.ones_like(snr), "v": snr + 1}[prediction]
    return WEIGHTS[weight](snr, gamma) / divisor


def flow_weights(weight: str, t: Tensor, gamma: float) -> Tensor:
    """Weights of the squared error of a flow's velocity.

    x_0 = x_t - t v gives d(x_0) = t d(v) for the errors d, and SNR = ((1 - t) / t)^2.

    Args:
        weight: one of `WEIGHTS`.
        t: (N,) in [0, 1].
        gamma: upper limit of 'min_snr'.

    Returns:
        (N,).
    """
    snr = ((1 - t) / t.clamp(min=1e-6)) ** 2
    return WEIGHTS[weight](snr, gamma) * t**2
