"""Images by their numbers: image i of a seed is the same however many are generated, and by which process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditune.autoencoders import Autoencoder
from ditune.data import to_uint8
from ditune.errors import UserError
from ditune.memory import memory_for
from ditune.processes import Process
from ditune.rng import mix
from ditune.samplers import Cache, Experts, Guide, NoiseStream, Sampler, ShortcutSampler, default_sampler, sample
from ditune.stopping import check

FEWER = "Set sampler.batch_size lower; of src/sample.py, set n= lower and generate the rest with first=."
TILES = "Set autoencoder.tiling=true or sampler.batch_size lower; of src/sample.py, n= lower and the rest with first=."


@dataclass(frozen=True)
class ImageGenerator:
    """Everything that decides how a network's images look, except the network.

    Args:
        process, autoencoder: of the network.
        resolution: side of the images, in pixels.
        sampler: how; None = as suits the process.
        steps: network evaluations; None = 4 of the few-step sampler, 25 of others.
        guidance, guidance_interval, guidance_channels, guidance_rescale: see `ditune.samplers.sample`.
        batch_size: images at once, at most.
        bf16: the network runs under bf16 autocast.
        cache: reuse of block outputs between steps; None = none.
        guide: what guidance pushes away from; None = the network's own null class.
        noise_awareness, guidance_input: see `ditune.samplers.sample`.
        experts: adapters of the network by time, see `ditune.samplers.Experts`; None = the network as it is.
    """

    process: Process
    autoencoder: Autoencoder
    resolution: int
    sampler: Sampler | None
    steps: int | None
    guidance: float = 1.0
    guidance_interval: Sequence[float] = (0.0, 1.0)
    guidance_channels: int | None = None
    guidance_rescale: float = 0.0
    batch_size: int = 64
    bf16: bool = True
    cache: Cache | None = None
    guide: Guide | None = None
    noise_awareness: float = 0.0
    guidance_input: float | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", self.sampler or default_sampler(self.process))
        if self.steps is None:
            object.__setattr__(self, "steps", 4 if isinstance(self.sampler, ShortcutSampler) else 25)

    def generate(
        self,
        network: nn.Module,
        labels: Tensor,
        seed: int,
        indices: Sequence[int] | None = None,
        on_batch: Callable[[int], None] | None = None,
        fixed_batch: bool = False,
    ) -> Tensor:
        """One image for every label, uint8 (N, 3, R, R) on the CPU.

        Kernels are chosen by the size of the batch, so batches of two sizes round differently: without `fixed_batch`
        image i of a seed is the same within 1 of 255 however many are generated, with it to the bit.

        Args:
            network: in evaluation mode; `labels` (N,) are its classes.
            seed: of all noise, with the image's number.
            indices: numbers of the images; None = 0..N-1.
            on_batch: called after every batch with the number of images that are done.
            fixed_batch: every batch is padded to `batch_size`; else to the next power of two, which is never more
                than twice the work that was asked for.
        """
        indices = list(range(len(labels))) if indices is None else list(indices)
        images = []
        for start in range(0, len(labels), self.batch_size):
            rows = indices[start : start + self.batch_size]
            y = labels[start : start + self.batch_size]
            padding = (self.batch_size if fixed_batch else self._padded(len(rows))) - len(rows)
            padded_rows, padded_y = rows + rows[-1:] * padding, torch.cat([y, y[-1:].expand(padding)])
            images.append(self._batch(network, padded_y, seed, padded_rows)[: len(rows)].cpu())
            check()
            if on_batch is not None:
                on_batch(start + len(rows))
        return torch.cat(images)

    draw = generate  # its earlier name

    def _padded(self, count: int) -> int:
        """Few sizes, so that few kernels are tuned or compiled."""
        return min(1 << (count - 1).bit_length(), self.batch_size)

    def pairs(self, network: nn.Module, labels: Tensor, seed: int, indices: Sequence[int]) -> Tensor:
        """The latents that the network makes of the noise of images, float32 (N, C, h, w) on the CPU.

        Args:
            network, labels, seed, indices: see `generate`; `batch_size` images at most.

        Raises:
            UserError: the sampler adds noise on its way, so that a latent is no function of its first noise.
        """
        rows, padding = list(indices), self._padded(len(indices)) - len(indices)
        y = torch.cat([labels, labels[-1:].expand(padding)])
        latents = self._latents(network, y, seed, rows + rows[-1:] * padding, self._refuse_noise)
        check()
        return latents[: len(rows)].float().cpu()

    def _refuse_noise(self) -> Tensor:
        raise UserError(
            f"sampler={self.sampler.kind} adds noise on its way, and a pair is a function of its first noise. "
            "Set sampler=ddim, or euler for a flow."
        )

    @torch.inference_mode()
    def _batch(self, network: nn.Module, y: Tensor, seed: int, indices: list[int]) -> Tensor:
        latents = self._latents(network, y, seed, indices)
        with memory_for(f"decoding {len(indices)} images at once", TILES):
            return to_uint8(self.autoencoder.to(latents.device).to_pixels(latents.float()))

    @torch.inference_mode()
    def _latents(
        self,
        network: nn.Module,
        y: Tensor,
        seed: int,
        indices: list[int],
        further_noise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        device = next(network.parameters()).device
        stream = NoiseStream(seed, indices, self.autoencoder.latent_shape(self.resolution))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)
        shortage = memory_for(f"generating {len(indices)} images at once", FEWER)
        with shortage, autocast, stream.on(device) as next_noise:
            return sample(
                network,
                self.process,
                stream.next().to(device),
                y.to(device),
                sampler=self.sampler,
                steps=self.steps,
                guidance=self.guidance,
                guidance_interval=self.guidance_interval,
                guidance_channels=self.guidance_channels,
                guidance_rescale=self.guidance_rescale,
                next_noise=further_noise or next_noise,
                on_step=lambda *_: check(),
                cache=self.cache,
                guide=self.guide,
                noise_awareness=self.noise_awareness,
                guidance_input=self.guidance_input,
                experts=self.experts,
            )


def example_plan(count: int, seed: int, n: int) -> list[int]:
    """Rows of a dataset of `count` images whose classes the images 0..n-1 get; each is a function of (seed, i)."""
    return [mix(seed, i, 2) % count for i in range(n)]


def label_plan(labels: Tensor, seed: int, n: int) -> Tensor:  # (n,)
    """Classes of images 0..n-1, with the frequencies of a dataset's `labels`."""
    return labels[torch.tensor(example_plan(len(labels), seed, n), dtype=torch.int64)]


Drawer = ImageGenerator  # its earlier name
