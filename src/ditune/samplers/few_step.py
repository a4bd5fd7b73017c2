"""Steps as long as the network has learned them: shortcut models and other flow maps, and consistency models."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn


class Jumps(Sampler):
    """Walks from noise to data in equal steps, each by the mean velocity over it (arXiv 2410.12557, algorithm 2).

    Shortcut models take 1, 2, 4 ... M steps; networks of any length of step take any number.
    """

    kind = "Jumps"
    process = FlowProcess

    def check(self, process: FlowProcess) -> None:
        """Whether the network has learned steps of this length.

        Raises:
            UserError: it has not.
        """
        if process.step == "none":
            raise UserError("The network is not told the length of a step, so it cannot jump. Set sampler=euler.")
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
        for t, s in pairwise(process.times().tolist()):
            velocity = model_fn(x, *(torch.full((len(x),), value, device=x.device) for value in (t, t - s)))
            x0, x = x - t * velocity, x - (t - s) * velocity
            yield t, x, x0


class Renoise(Sampler):
    """Jumps to the data and puts in the noise that belongs to the next step (arXiv 2303.01469, algorithm 1)."""

    kind = "Renoise"
    process = FlowProcess

    def walk(self, model_fn: ModelFn, process: FlowProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        for t, s in pairwise(process.times().tolist()):
            times = torch.full((len(x),), t, device=x.device)
            x0 = x - t * model_fn(x, times, times)
            x = (1 - s) * x0 + s * noise().to(x) if s > 0 else x0
            yield t, x, x0
