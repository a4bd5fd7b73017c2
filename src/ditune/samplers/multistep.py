"""Multistep methods on a flow, by diffusers' schedulers: one network evaluation per step, and a memory.

diffusers' sigma is our t, and its timestep is 1000 sigma. Its "flow prediction" is epsilon - x_0, our velocity.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ditune.errors import UserError, require
from ditune.processes import FlowProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn, at_time

METHODS = ("dpm_solver", "unipc")


class Multistep(Sampler):
    """DPM-Solver++ of second order (arXiv 2211.01095) or UniPC (arXiv 2302.04867).

    Step-conditioned networks give the instantaneous velocity.

    Args:
        method: 'dpm_solver' or 'unipc'.
        shift: time shift of the steps (arXiv 2403.03206). Above 1, more of them are near the noise; 1 = none.

    Raises:
        UserError: an unknown method, or a shift that is not positive.
    """

    kind = "Multistep"
    parameters = ("method", "shift")
    process = FlowProcess

    def __init__(self, method: str = "dpm_solver", shift: float = 1.0):
        require(method in METHODS, "sampler.sampler.method", method, f"Choose one of {', '.join(METHODS)}.")
        require(shift > 0, "sampler.sampler.shift", shift, "Set it above 0.")
        self.method, self.shift = method, shift

    def check(self, process: FlowProcess) -> None:
        """Refuse a single step, which has no earlier step to use.

        Raises:
            UserError: the process has one step.
        """
        if process.steps < 2:
            raise UserError(
                f"steps is {process.steps}, and a multistep method needs an earlier step. "
                "Set steps to 2 or more, or sampler=euler."
            )

    def scheduler(self, times: np.ndarray):  # (steps + 1,), from 1 to 0
        """diffusers' scheduler on our times; its own grid does not end in even steps, and may shift twice.

        Args:
            times: (steps + 1,) from 1 to 0.
        """
        from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

        kind = {"dpm_solver": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[self.method]
        scheduler = kind(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, final_sigmas_type="zero"
        )
        scheduler.set_timesteps(len(times) - 1)
        # at sigma = 1 the logarithm of the signal is infinite: the first step begins as far below as diffusers' UniPC
        sigmas = times.clip(max=1 - 1e-6)
        scheduler.sigmas = torch.from_numpy(sigmas).float()
        scheduler.timesteps = torch.from_numpy(1000 * sigmas[:-1]).float()
        return scheduler

    def walk(self, model_fn: ModelFn, process: FlowProcess, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Take the process's steps, see `Sampler.walk`."""
        times = process.times(self.shift).numpy()
        scheduler = self.scheduler(times)
        for t, timestep in zip(times[:-1].tolist(), scheduler.timesteps, strict=True):
            velocity = at_time(model_fn, t)(x, torch.full((len(x),), t, device=x.device))
            x0 = x - t * velocity
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
            yield t, x, x0
