"""Multistep methods on a flow, by diffusers' schedulers: one network evaluation a step, and a memory.

diffusers counts sigma = t and gives the network 1000 sigma; its "flow prediction" is epsilon - x_0, our velocity.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess
from ditune.samplers.base import NoiseFn, Sampler, Step
from ditune.samplers.guidance import ModelFn

METHODS = ("dpm_solver", "unipc")


class Multistep(Sampler):
    """DPM-Solver++ of second order (arXiv 2211.01095) or UniPC (arXiv 2302.04867).

    Networks that are told steps are asked for the velocity itself.

    Args:
        method: 'dpm_solver' or 'unipc'.
        shift: time shift of the steps (arXiv 2403.03206): above 1 more of them stand near the noise; 1 = none.

    Raises:
        UserError: an unknown method, or a shift that is not positive.
    """

    kind = "Multistep"
    parameters = ("method", "shift")
    process = FlowProcess

    def __init__(self, method: str = "dpm_solver", shift: float = 1.0):
        if method not in METHODS or shift <= 0:
            raise UserError(f"There is no such method. Set method to one of {', '.join(METHODS)} and shift above 0.")
        self.method, self.shift = method, shift

    def check(self, process: FlowProcess) -> None:
        """Whether there is a step that another one can be remembered in.

        Raises:
            UserError: there is only one.
        """
        if process.steps < 2:
            raise UserError(
                "A multistep method cannot generate in one step, for it has none to look back to. "
                "Set steps to 2 or more, or sampler=euler."
            )

    def scheduler(self, times: np.ndarray):  # (steps + 1,), from 1 to 0
        """diffusers' scheduler on our times: its own grid does not end in even steps, and may shift twice."""
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
        times = process.times(self.shift).numpy()
        scheduler = self.scheduler(times)
        for t, timestep in zip(times[:-1].tolist(), scheduler.timesteps, strict=True):
            velocity = model_fn(x, torch.full((len(x),), t, device=x.device))
            x0 = x - t * velocity
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
            yield t, x, x0
