"""Noise that depends on the image, not on the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ditune.rng import generator


class NoiseStream:
    """Noise of some images of a seed. Image i has its own generator, so its noise is the same in every batch.

    Args:
        seed: any integer.
        indices: number i of each image.
        shape: (C, H, W) of one image.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]):
        self.shape = tuple(shape)
        self.generators = [generator(seed, int(i)) for i in indices]

    def next(self) -> Tensor:  # (N, C, H, W) float32 on the CPU
        """The next standard normal noise of every image; the first call gives x_T."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
