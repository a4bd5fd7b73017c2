"""Sampling from a network: samplers, guidance and guides, and noise per image."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes import FlowProcess, GaussianProcess, Process
from ditune.samplers.base import Sampler
from ditune.samplers.caching import Cache, Delta, Fora, Taylor
from ditune.samplers.ddim import DDIM
from ditune.samplers.ddpm import DDPM
from ditune.samplers.euler import Euler
from ditune.samplers.experts import Experts
from ditune.samplers.few_step import ConsistencySampler, Jumps, Renoise, ShortcutSampler
from ditune.samplers.guidance import ModelFn, guide, guided
from ditune.samplers.guides import BaseGuide, CheckpointGuide, Guide, InterpolatedGuide
from ditune.samplers.multistep import Multistep
from ditune.samplers.noise import NoiseStream
from ditune.samplers.noise_awareness import noise_aware, untimed
from ditune.samplers.runge_kutta import RungeKutta

NAMES = {GaussianProcess: "a diffusion", FlowProcess: "a flow"}

__all__ = [
    "DDIM",
    "DDPM",
    "BaseGuide",
    "Cache",
    "CheckpointGuide",
    "ConsistencySampler",
    "Delta",
    "Euler",
    "Experts",
    "Fora",
    "Guide",
    "InterpolatedGuide",
    "Jumps",
    "ModelFn",
    "Multistep",
    "NoiseStream",
    "Renoise",
    "RungeKutta",
    "Sampler",
    "ShortcutSampler",
    "Taylor",
    "check",
    "default_sampler",
    "guide",
    "guided",
    "sample",
]


def default_sampler(process: Process) -> Sampler:
    """The sampler for networks of this process, unless another is configured."""
    if isinstance(process, FlowProcess):
        if process.straightened:
            return Euler(told=1.0)
        return Euler() if process.step == "none" else ShortcutSampler()
    return DDIM()


def check(
    sampler: Sampler, process: Process, steps: int, cache: Cache | None = None, guide: Guide | None = None
) -> None:
    """Refuse a sampler, a number of steps or a cache that does not suit the process.

    Args:
        sampler: the sampler.
        process: the process that the network was trained on.
        steps: number of steps.
        cache: of block outputs; None = none.
        guide: of guidance; None = the null class.

    Raises:
        UserError: the sampler cannot sample from the process in this number of steps; or a cache is asked for, and the
            network is called more than once in each step.
    """
    if not isinstance(process, sampler.process):
        fitting = "euler" if isinstance(process, FlowProcess) else "ddim or ddpm"
        raise UserError(
            f"The network was trained on {NAMES[type(process)]}, and {sampler.kind} samples from "
            f"{NAMES[sampler.process]}. Set sampler=auto, or sampler={fitting}."
        )
    in_steps = process.in_steps(steps)
    if isinstance(in_steps, GaussianProcess) and steps == 1 < in_steps.timesteps:
        raise UserError(
            "steps is 1, and the only step of a diffusion would be at t = 0: it cannot make an image from noise. "
            "Set steps to 2 or more; 25 and more give good images."
        )
    sampler.check(in_steps)
    if cache is not None and sampler.calls_per_step != 1:
        raise UserError(
            f"{sampler.kind} calls the network {sampler.calls_per_step} times in each step, at other times, and a "
            "cache would mix them. Set cache=none, or choose a sampler of one call in each step."
        )
    if cache is not None and guide is not None:
        raise UserError(
            f"sampler.guide={guide.kind} calls two networks in each step, and a cache would mix them. Set cache=none, "
            "or sampler.guide=null_class."
        )


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
    cache: Cache | None = None,
    guide: Guide | None = None,
    noise_awareness: float = 0.0,
    guidance_input: float | None = None,
    experts: Experts | None = None,
) -> Tensor:  # (N, C, H, W)
    """Generate one image per label.

    Args:
        network: (x, t, y) -> raw output, in evaluation mode; its `num_classes` is the null class.
        process: the process that the network was trained on.
        noise: (N, C, H, W) standard normal noise, on the network's device.
        y: (N,) int64 labels.
        sampler: a sampler that suits the process.
        steps: number of steps from noise to data. A diffusion takes 2..`process.timesteps`.
        guidance: scale of guidance; 1 = none.
        guidance_interval: part of the process in which guidance is on, 0 = data and 1 = noise.
        guidance_channels: number of leading channels that are guided; None = all.
        guidance_rescale: phi of arXiv 2305.08891, in [0, 1]; 0 = off.
        next_noise: returns the noise (N, C, H, W) of each step of a random sampler; None = torch's global generator.
        on_step: called after every step with (time at its beginning, x, predicted x_0).
        cache: reuse of block outputs between steps; None = everything is computed in every step.
        guide: what guidance pushes away from; None = the network's own null class.
        noise_awareness: scale s of noise-awareness guidance; 0 = none, as always of networks that were not trained for
            it.
        guidance_input: w that the network is given; None = 1, as always of networks without this input.
        experts: adapters of `network`, of which the one of each call's time runs; None = the network as it is.

    Returns:
        (N, C, H, W) data or latents.

    Raises:
        UserError: the sampler, the steps or the cache do not suit the process.
    """
    check(sampler, process, steps, cache, guide)
    if experts is not None and cache is not None:
        raise UserError("A cache would mix outputs of several experts. Set cache=none, or sample from one run.")
    weaker = None if guide is None or guidance == 1 else guide.bind(network, process, y)
    in_steps = process.in_steps(steps)
    with nullcontext(network) if cache is None else cache.used(network, in_steps.steps) as called:
        config = getattr(network, "config", {})
        if guidance_input is not None and config.get("guided"):
            called = partial(called, w=noise.new_full((), guidance_input))
        bound = process.bind(called)
        if noise_awareness and config.get("untimed"):
            bound = noise_aware(bound, process.bind(untimed(called)), network.num_classes, noise_awareness)
        model_fn = guided(
            bound,
            y,
            network.num_classes,
            guidance,
            interval=guidance_interval,
            channels=guidance_channels,
            timesteps=process.length,
            rescale=guidance_rescale,
            weaker=weaker,
        )
        with nullcontext(model_fn) if experts is None else experts.choosing(model_fn, process.length) as chosen:
            return sampler(chosen, in_steps, noise, next_noise or (lambda: torch.randn_like(noise)), on_step)
