"""The pretrained network's own images, which Diff-Tuning keeps among the new ones."""

import logging
from zlib import crc32

import torch

from ditune.generation.generator import ImageGenerator
from ditune.objectives import DiffTuning
from ditune.progress import meter
from ditune.rng import mix
from ditune.samplers import NoiseStream, sample
from ditune.training.components import Components
from ditune.training.module import GenerativeModule

log = logging.getLogger(__name__)


def keep_base_samples(c: Components, module: GenerativeModule, generator: ImageGenerator, device: torch.device) -> None:
    """Generate the latents that the objective asks for, with the run's sampler; every process makes all of them.

    They are functions of the seed and of the pretrained network, so a run that goes on makes the same ones again.
    Their classes are the base's in turn, or the null class where the run has a new label table.

    Args:
        c: what the run is made of; nothing happens unless its objective wants images of the base.
        module: of the run, whose `base` generates.
        generator: of the run's images.
        device: of the training.
    """
    objective = c.objective
    if not isinstance(objective, DiffTuning) or not objective.needs_base:
        return
    count, null, size = objective.n, c.network.num_classes, generator.batch_size
    seed, shape = mix(c.settings.seed, crc32(b"base samples")), c.autoencoder.latent_shape(c.settings.resolution)
    labels = torch.arange(count) % null if c.settings.classes is None else torch.full((count,), null)
    c.network.to(device).eval()
    made = []
    with meter("generating images of the base", count) as progress:
        for first in range(0, count, size):
            rows = list(range(first, min(first + size, count)))
            stream = NoiseStream(seed, rows, shape)
            with torch.autocast(device.type, torch.bfloat16, enabled=generator.bf16):
                latents = sample(
                    module.base,
                    generator.process,
                    stream.next().to(device),
                    labels[rows].to(device),
                    sampler=generator.sampler,
                    steps=generator.steps,
                    guidance=generator.guidance,
                    guidance_interval=generator.guidance_interval,
                    guidance_channels=generator.guidance_channels,
                    guidance_rescale=generator.guidance_rescale,
                    next_noise=lambda stream=stream: stream.next().to(device),
                )
            made.append(latents.float().cpu())
            progress.advance(len(rows))
    c.network.train()
    objective.samples = torch.cat(made).clone()  # (n, C, h, w), no longer an inference tensor
