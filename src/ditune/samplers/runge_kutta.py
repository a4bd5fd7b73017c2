"""Methods of second order on a flow: the step's velocity is that of its end or its middle too."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess
from ditune.samplers.guidance import ModelFn

METHODS = ("heun", "midpoint")


class RungeKutta:
    """Heun's method (the mean of both ends' velocities) or the midpoint method (the middle's velocity).

    Both evaluate the network twice in a step, Heun's once in the last, which ends at the data. Networks that are told
    steps are asked for the velocity itself.

    Args:
        method: 'heun' or 'midpoint'.
        shift: time shift of the steps (arXiv 2403.03206): above 1 more of them stand near the noise; 1 = none.

    Raises:
        UserError: an unknown method, or a shift that is not positive.
    """

    process = FlowProcess

    def __init__(self, method: str = "heun", shift: float = 1.0):
        if method not in METHODS or shift <= 0:
            raise UserError(f"There is no such method. Set method to one of {', '.join(METHODS)} and shift above 0.")
        self.method, self.shift = method, shift

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
            model_fn: (x, t) -> velocity.
            process: its steps are the steps taken.
            x: (N, C, H, W) standard normal noise.
            noise: not called.
            on_step: called after every step with (t at its beginning, x, predicted x_0).
        """

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
            if on_step is not None:
                on_step(t, x, x0)
        return x
