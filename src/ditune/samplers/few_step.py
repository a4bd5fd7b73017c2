"""Samplers of step-conditioned networks: shortcut models and other flow maps, and consistency models."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn, at_time


class ShortcutSampler(Sampler):
    """x_s = x_t - (t - s) u(x_t, t, t - s) in equal steps, from noise to data (arXiv 2410.12557, algorithm 2).

    Shortcut models take 1, 2, 4 ... M steps. Networks that are conditioned on any step size take any number.
    """

    kind = "Jumps"
    process = FlowProcess

    def check(self, process: FlowProcess) -> None:
        """Refuse step sizes that the network was not trained for.

        Raises:
            UserError: the network is not step-conditioned, or not trained for this number of steps.
        """
        if process.step == "none":
            raise UserError(
                "sampler=jumps needs a step-conditioned network, and objective.process.step is 'none'. "
                "Set sampler=euler."
            )
        if process.base_steps is None:
            return
        halvings = process.base_steps.bit_length() - 1
        trained = [2**k for k in ((0, halvings) if process.straightened else range(halvings + 1))]
        if process.steps not in trained:
            raise UserError(
                f"The network was not trained for {process.steps} steps. "
                f"Set steps to one of {', '.join(map(str, trained))}."
            )

    def walk(self, model_fn: ModelFn, process: FlowProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Take the process's steps, see `Sampler.walk`."""
        for t, s in pairwise(process.times().tolist()):
            velocity = at_time(model_fn, t)(x, *(torch.full((len(x),), value, device=x.device) for value in (t, t - s)))
            x0, x = x - t * velocity, x - (t - s) * velocity
            yield t, x, x0


class ConsistencySampler(Sampler):
    """Predicts x_0, then adds the noise of the next step's time (arXiv 2303.01469, algorithm 1)."""

    kind = "Renoise"
    process = FlowProcess

    def walk(self, model_fn: ModelFn, process: FlowProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Take the process's steps, see `Sampler.walk`."""
        for t, s in pairwise(process.times().tolist()):
            times = torch.full((len(x),), t, device=x.device)
            x0 = x - t * at_time(model_fn, t)(x, times, times)
            x = (1 - s) * x0 + s * noise().to(x) if s > 0 else x0
            yield t, x, x0


# earlier names, used in configs and stored results
Jumps = ShortcutSampler
Renoise = ConsistencySampler
