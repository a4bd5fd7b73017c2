"""Euler's method on a flow (Liu et al. 2022, arXiv 2209.03003)."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ditune.errors import require
from ditune.processes import FlowProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn, at_time


class Euler(Sampler):
    """x_s = x_t - (t - s) v(x_t, t), from noise to data.

    Args:
        shift: time shift of the steps (arXiv 2403.03206). Above 1, more of them are near the noise; 1 = none.
        eta: randomness, 0 = none. The marginals are the same for every eta (arXiv 2401.08740, diffusion w = 2 eta t).
            At 1, each step replaces as much noise as it removes.
        told: step size passed to step-conditioned networks, in [0, 1]; 0 = instantaneous velocity. The reflowed flow of
            live reflow is at 1. The name is part of stored protocols.

    Raises:
        UserError: a number out of range.
    """

    kind = "Euler"
    parameters = ("shift", "eta", "told")
    process = FlowProcess

    def __init__(self, shift: float = 1.0, eta: float = 0.0, told: float = 0.0):
        require(shift > 0, "sampler.sampler.shift", shift, "Set it above 0.")
        require(eta >= 0, "sampler.sampler.eta", eta, "Set it to 0 or more.")
        require(0 <= told <= 1, "sampler.sampler.told", told, "It is a step size: set it between 0 and 1.")
        self.shift, self.eta, self.told = shift, eta, told

    def walk(self, model_fn: ModelFn, process: FlowProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Take the process's steps, see `Sampler.walk`."""
        for t, s in pairwise(process.times(self.shift).tolist()):
            velocity = at_time(model_fn, t)(
                x, *(torch.full((len(x),), value, device=x.device) for value in (t, self.told))
            )
            x0, epsilon = x - t * velocity, x + (1 - t) * velocity
            x = x - (t - s) * velocity
            if self.eta > 0 and s > 0:
                x = x - (t - s) * self.eta * epsilon + (2 * self.eta * t * (t - s)) ** 0.5 * noise().to(x)
            yield t, x, x0
