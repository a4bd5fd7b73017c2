"""How images are drawn: samplers, guidance, and noise that belongs to the image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess, GaussianProcess, Process
from ditune.samplers.base import Sampler
from ditune.samplers.ddim import DDIM
from ditune.samplers.ddpm import DDPM
from ditune.samplers.euler import Euler
from ditune.samplers.few_step import Jumps, Renoise
from ditune.samplers.guidance import ModelFn, guided
from ditune.samplers.multistep import Multistep
from ditune.samplers.noise import NoiseStream
from ditune.samplers.runge_kutta import RungeKutta

NAMES = {GaussianProcess: "a diffusion", FlowProcess: "a flow"}

__all__ = [
    "DDIM",
    "DDPM",
    "Euler",
    "Jumps",
    "ModelFn",
    "Multistep",
    "NoiseStream",
    "Renoise",
    "RungeKutta",
    "Sampler",
    "check",
    "default_sampler",
    "guided",
    "sample",
]


def default_sampler(process: Process) -> Sampler:
    """What draws a network of this process where nothing else is asked for."""
    if isinstance(process, FlowProcess):
        if process.straightened:
            return Euler(told=1.0)
        return Euler() if process.step == "none" else Jumps()
    return DDIM()


def check(sampler: Sampler, process: Process, steps: int) -> None:
    """Whether the sampler can draw from networks of the process in so many steps.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(process, sampler.process):
        fitting = "euler" if isinstance(process, FlowProcess) else "ddim or ddpm"
        raise UserError(
            f"The network was trained on {NAMES[type(process)]}, and {sampler.kind} draws from "
            f"{NAMES[sampler.process]}. Set sampler=auto, or sampler={fitting}."
        )
    in_steps = process.in_steps(steps)
    if isinstance(in_steps, GaussianProcess) and steps == 1 < in_steps.timesteps:
        raise UserError(
            "One step of a diffusion stands next to the data (t = 0) and cannot make an image out of noise. "
            "Set steps to 2 or more; 25 and more give good images."
        )
    sampler.check(in_steps)


@torch.inference_mode()
def sample(
    network: Callable[..., Tensor],
    process: Process,
    noise: Tensor,
    y: Tensor,
    *,
    sampler: Sampler,
    steps: int,
    guidance: float = 1.0,
    guidance_interval: Sequence[float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    guidance_rescale: float = 0.0,
    next_noise: Callable[[], Tensor] | None = None,
    on_step: Callable[[float, Tensor, Tensor], None] | None = None,
) -> Tensor:  # (N, C, H, W)
    """Draw one image for every label.

    Args:
        network: (x, t, y) -> raw output, in evaluation mode; its `num_classes` is the null class.
        process: the process that the network was trained on.
        noise: (N, C, H, W) standard normal noise, on the network's device.
        y: (N,) int64 labels.
        sampler: one that suits the process.
        steps: of the sampler, from end to end of the process. A diffusion has 2..`process.timesteps` of them: a single
            one would stand at t = 0 and cannot make an image out of noise.
        guidance: scale of classifier-free guidance; 1 is none.
        guidance_interval: part of the process, 0 = data and 1 = noise, in which guidance is on.
        guidance_channels: number of leading channels that are guided; None guides all.
        guidance_rescale: share of the way back to the spread that the output has without guidance; 0 = none.
        next_noise: gives the noise (N, C, H, W) of each step of a random sampler; torch's global generator otherwise.
        on_step: called after every step with (time at its beginning, x, predicted x_0).

    Raises:
        UserError: the sampler or the steps do not suit the process.
    """
    check(sampler, process, steps)
    model_fn = guided(
        *(process.bind(network), y, network.num_classes, guidance, guidance_interval, guidance_channels),
        timesteps=process.length,
        rescale=guidance_rescale,
    )
    return sampler(model_fn, process.in_steps(steps), noise, next_noise or (lambda: torch.randn_like(noise)), on_step)
