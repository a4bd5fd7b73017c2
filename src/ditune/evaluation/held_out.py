"""Latents of held-out images: from their cache, or encoded when they are first asked for."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ditune.ahead import ahead
from ditune.autoencoders import Autoencoder
from ditune.data import ImageDataset, from_uint8
from ditune.data.latents import Means

IN_MEMORY = 2**30  # bytes of latents that are kept, so that the next network need not encode again


class HeldOut(Protocol):
    """Images that are not trained on, as the network sees them."""

    def __len__(self) -> int:
        """Number of images."""

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) float32, with shift and scale, and labels (B,) of images at the given positions."""


class CachedHeldOut:
    """Held-out images whose latents are on disk.

    Args:
        means: the cache.
        autoencoder: that it was made with.
    """

    def __init__(self, means: Means, autoencoder: Autoencoder) -> None:
        self.means, self.autoencoder = means, autoencoder

    def __len__(self) -> int:
        return len(self.means)

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """See `HeldOut`."""
        means, y = self.means.take(rows)
        return self.autoencoder.to(device).from_moments(means.to(device), None), y.to(device)


class EncodedHeldOut:
    """Held-out images that are encoded on the way; their latents are kept if they fit into a gigabyte.

    Args:
        images: usually a test split.
        autoencoder: encodes them.
    """

    def __init__(self, images: ImageDataset, autoencoder: Autoencoder) -> None:
        self.images, self.autoencoder = images, autoencoder
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.images)

    @torch.inference_mode()
    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """See `HeldOut`; the same rows are encoded together each time, since kernels are chosen by their number."""
        key = tuple(rows)
        if key not in self._known:
            latents = self.autoencoder.to(device).to_latent(from_uint8(self._pixels(rows).to(device))).cpu()
            if self._bytes + latents.nbytes > IN_MEMORY:
                return latents.to(device), self.images.labels[list(rows)].to(device)
            self._bytes += latents.nbytes
            self._known[key] = latents, self.images.labels[list(rows)]
        latents, y = self._known[key]
        return latents.to(device), y.to(device)

    def _pixels(self, rows: Sequence[int]) -> Tensor:
        if self.images.in_memory:
            return self.images.__getitems__(rows)[0]
        return torch.stack(list(ahead(lambda i: self.images[i][0], rows, len(rows))))
