"""Methods of second order on a flow: they also evaluate the velocity at the end or in the middle of each step."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ditune.errors import require
from ditune.processes import FlowProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn, at_time

METHODS = ("heun", "midpoint")


class RungeKutta(Sampler):
    """Heun's method (mean of the velocities at both ends) or the midpoint method (velocity in the middle).

    Both evaluate the network twice per step; Heun's method once in the last step, which ends at the data.
    Step-conditioned networks give the instantaneous velocity.

    Args:
        method: 'heun' or 'midpoint'.
        shift: time shift of the steps (arXiv 2403.03206). Above 1, more of them are near the noise; 1 = none.

    Raises:
        UserError: an unknown method, or a shift that is not positive.
    """

    kind = "RungeKutta"
    parameters = ("method", "shift")
    process = FlowProcess
    calls_per_step = 2

    def __init__(self, method: str = "heun", shift: float = 1.0):
        require(method in METHODS, "sampler.sampler.method", method, f"Choose one of {', '.join(METHODS)}.")
        require(shift > 0, "sampler.sampler.shift", shift, "Set it above 0.")
        self.method, self.shift = method, shift

    def walk(self, model_fn: ModelFn, process: FlowProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Take the process's steps, see `Sampler.walk`."""

        def velocity(x: Tensor, t: float) -> Tensor:
            return at_time(model_fn, t)(x, torch.full((len(x),), t, device=x.device))

        for t, s in pairwise(process.times(self.shift).tolist()):
            v = first = velocity(x, t)
            if self.method == "midpoint":
                middle = (t + s) / 2
                v = velocity(x - (t - middle) * v, middle)
            elif s > 0:
                v = (v + velocity(x - (t - s) * v, s)) / 2
            x0, x = x - t * first, x - (t - s) * v
            yield t, x, x0
