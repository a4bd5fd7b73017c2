"""Noise-awareness guidance (arXiv 2510.12497, ICLR 2026), for networks trained with `transfer=noise_awareness`.

eps(x, t, c) + s (eps(x, t, c) - eps(x, none, c)). Together with classifier-free guidance it is ours: the conditional
branch is replaced by this prediction, the unconditional branch stays, and a step takes three evaluations.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def noise_aware(network: Callable[..., Tensor], timeless: Callable[..., Tensor], null_class: int, scale: float):
    """A network whose predictions for a class are pushed away from those without the time.

    Args:
        network: (x, t, y) -> output, or (x, t, y, step) -> output.
        timeless: the same network, which is not given the time.
        null_class: label of the samples that stay as they are.
        scale: s; at 0 the network itself is returned.

    Returns:
        A function like `network`. A learned variance, behind the channels of x, stays.
    """
    if scale == 0:
        return network

    def pushed(x: Tensor, t: Tensor, y: Tensor, *step: Tensor) -> Tensor:
        output, rows = network(x, t, y, *step), (y != null_class).nonzero()[:, 0]
        if len(rows) == 0:
            return output
        without = timeless(*(value[rows] for value in (x, t, y, *step)))
        known = output[rows, : x.shape[1]]
        output = output.clone()
        output[rows, : x.shape[1]] = known + scale * (known - without[:, : x.shape[1]])
        return output

    return pushed


def untimed(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The network with a missing time, for networks with `DiT.no_time`."""
    return lambda x, t, *inputs, **more: network(x, torch.full(t.shape, torch.nan, device=t.device), *inputs, **more)
