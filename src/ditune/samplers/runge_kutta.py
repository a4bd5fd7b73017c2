"""Methods of second order on a flow: the step's velocity is that of its end or its middle too."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn

METHODS = ("heun", "midpoint")


class RungeKutta(Sampler):
    """Heun's method (the mean of both ends' velocities) or the midpoint method (the middle's velocity).

    Both evaluate the network twice in a step, Heun's once in the last, which ends at the data. Networks that are told
    steps are asked for the velocity itself.

    Args:
        method: 'heun' or 'midpoint'.
        shift: time shift of the steps (arXiv 2403.03206): above 1 more of them stand near the noise; 1 = none.

    Raises:
        UserError: an unknown method, or a shift that is not positive.
    """

    kind = "RungeKutta"
    parameters = ("method", "shift")
    process = FlowProcess

    def __init__(self, method: str = "heun", shift: float = 1.0):
        if method not in METHODS or shift <= 0:
            raise UserError(f"There is no such method. Set method to one of {', '.join(METHODS)} and shift above 0.")
        self.method, self.shift = method, shift

    def walk(self, model_fn: ModelFn, process: FlowProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:

        def velocity(x: Tensor, t: float) -> Tensor:
            return model_fn(x, torch.full((len(x),), t, device=x.device))

        for t, s in pairwise(process.times(self.shift).tolist()):
            v = first = velocity(x, t)
            if self.method == "midpoint":
                middle = (t + s) / 2
                v = velocity(x - (t - middle) * v, middle)
            elif s > 0:
                v = (v + velocity(x - (t - s) * v, s)) / 2
            x0, x = x - t * first, x - (t - s) * v
            yield t, x, x0
