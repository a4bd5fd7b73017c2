"""Euler's method on a flow (Liu et al. 2022, arXiv 2209.03003)."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn


class Euler(Sampler):
    """Walks from noise to data along the velocity at each step's beginning.

    Args:
        shift: time shift of the steps (arXiv 2403.03206): above 1 more of them stand near the noise; 1 = none.
        eta: randomness; the steps have the same marginals for every eta. 0 = none, 1 = as much noise is taken out of x
            and put in again as the step passes (arXiv 2401.08740, with diffusion w = 2 eta t).
        told: length of the step that networks that are told steps hear; 0 = the velocity itself. Live reflow's
            straightened flow is 1.

    Raises:
        UserError: a number out of range.
    """

    kind = "Euler"
    parameters = ("shift", "eta", "told")
    process = FlowProcess

    def __init__(self, shift: float = 1.0, eta: float = 0.0, told: float = 0.0):
        if shift <= 0 or eta < 0 or not 0 <= told <= 1:
            raise UserError("Euler's steps cannot be so. Set shift above 0, eta to 0 or more and told between 0 and 1.")
        self.shift, self.eta, self.told = shift, eta, told

    def walk(self, model_fn: ModelFn, process: FlowProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        for t, s in pairwise(process.times(self.shift).tolist()):
            velocity = model_fn(x, *(torch.full((len(x),), value, device=x.device) for value in (t, self.told)))
            x0, epsilon = x - t * velocity, x + (1 - t) * velocity
            x = x - (t - s) * velocity
            if self.eta > 0 and s > 0:
                x = x - (t - s) * self.eta * epsilon + (2 * self.eta * t * (t - s)) ** 0.5 * noise().to(x)
            yield t, x, x0
