"""Steps as long as the network has learned them: shortcut models and other flow maps, and consistency models."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess
from ditune.samplers.guidance import ModelFn


class Jumps:
    """Walks from noise to data in equal steps, each by the mean velocity over it (arXiv 2410.12557, algorithm 2).

    Shortcut models take 1, 2, 4 ... M steps; networks of any length of step take any number.
    """

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

    @torch.inference_mode()
    def __call__(
        self,
        model_fn: ModelFn,
        process: FlowProcess,
        x: Tensor,
        noise: Callable[[], Tensor],
        on_step: Callable[[float, Tensor, Tensor], None] | None = None,
    ) -> Tensor:  # (N, C, H, W)
        """Go from noise to data.

        Args:
            model_fn: (x, t, length of the step) -> mean velocity.
            process: its steps are the steps taken.
            x: (N, C, H, W) standard normal noise.
            noise: not called.
            on_step: called after every step with (t at its beginning, x, predicted x_0).
        """
        for t, s in pairwise(process.times().tolist()):
            velocity = model_fn(x, *(torch.full((len(x),), value, device=x.device) for value in (t, t - s)))
            x0, x = x - t * velocity, x - (t - s) * velocity
            if on_step is not None:
                on_step(t, x, x0)
        return x


class Renoise:
    """Jumps to the data and puts in the noise that belongs to the next step (arXiv 2303.01469, algorithm 1)."""

    process = FlowProcess

    def check(self, process: FlowProcess) -> None:
        """Any number of steps will do."""

    @torch.inference_mode()
    def __call__(
        self,
        model_fn: ModelFn,
        process: FlowProcess,
        x: Tensor,
        noise: Callable[[], Tensor],
        on_step: Callable[[float, Tensor, Tensor], None] | None = None,
    ) -> Tensor:  # (N, C, H, W)
        """Go from noise to data.

        Args:
            model_fn: (x, t, t) -> mean velocity down to the data.
            process: its steps are the steps taken.
            x: (N, C, H, W) standard normal noise.
            noise: gives (N, C, H, W) standard normal noise; called at every step but the last.
            on_step: called after every step with (t at its beginning, x, predicted x_0).
        """
        for t, s in pairwise(process.times().tolist()):
            times = torch.full((len(x),), t, device=x.device)
            x0 = x - t * model_fn(x, times, times)
            x = (1 - s) * x0 + s * noise().to(x) if s > 0 else x0
            if on_step is not None:
                on_step(t, x, x0)
        return x
