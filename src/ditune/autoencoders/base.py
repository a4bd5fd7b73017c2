"""The interface between pixels, float (N, 3, H, W) in [-1, 1], and the latents that a network is trained on."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, final

import torch
from einops import rearrange
from torch import Tensor, nn

from ditune.errors import UserError


class Autoencoder(nn.Module, ABC):
    """Encoder and decoder, and the shift and scale that bring the latents to about unit variance.

    A subclass implements `encode` and `decode`, without shift and scale.

    Args:
        channels: C of the latents.
        downsample: pixels per latent along each side.

    Attributes:
        shift: (C,) buffer, subtracted from the encoder's latents.
        scale: (C,) buffer, multiplied after that.
    """

    kind: ClassVar[str]  # part of the fingerprints in stored files; the class may be renamed
    shift: Tensor
    scale: Tensor
    moments = 1  # of the posterior: 1 = its mean, 2 = mean and log-variance

    def __init__(self, channels: int, downsample: int) -> None:
        super().__init__()
        self.channels = channels
        self.downsample = downsample
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode pixels, without shift and scale.

        Args:
            x: (N, 3, H, W) in [-1, 1].

        Returns:
            Mean and log-variance of the posterior, (N, C, h, w) each. The log-variance of a deterministic encoder is
            None.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents, without shift and scale.

        Args:
            z: (N, C, h, w).

        Returns:
            Pixels (N, 3, H, W), not clamped.
        """

    @final
    def to_latent(self, x: Tensor, normal: Callable[[Sequence[int]], Tensor] | None = None) -> Tensor:
        """Pixels to the network's latents.

        Args:
            x: (N, 3, H, W) in [-1, 1].
            normal: (C, h, w) -> standard normal (N, C, h, w), for a sample of the posterior; None = its mean.

        Returns:
            (N, C, h, w).
        """
        return self.from_moments(*self.encode(x), normal)

    @final
    def from_moments(
        self, mean: Tensor, logvar: Tensor | None, normal: Callable[[Sequence[int]], Tensor] | None = None
    ) -> Tensor:
        """Result of `encode`, for example from a cache, to the network's latents.

        Args:
            mean: (N, C, h, w).
            logvar: (N, C, h, w) or None.
            normal: see `to_latent`.

        Returns:
            (N, C, h, w).
        """
        z = mean
        if normal is not None and logvar is not None:
            z = z + torch.exp(logvar / 2) * normal(z.shape[1:])
        return (z - self._per_channel(self.shift)) * self._per_channel(self.scale)

    @final
    def to_pixels(self, z: Tensor) -> Tensor:
        """The network's latents (N, C, h, w) to pixels (N, 3, H, W), not clamped."""
        return self.decode(z / self._per_channel(self.scale) + self._per_channel(self.shift))

    @final
    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of an image's latents.

        Args:
            resolution: side of the image, in pixels.

        Raises:
            UserError: the resolution is no multiple of `downsample`.
        """
        if resolution % self.downsample:
            raise UserError(
                f"data.resolution is {resolution}, and {resolution} pixels do not divide into blocks of "
                f"{self.downsample}. Set it to a multiple of {self.downsample}."
            )
        side = resolution // self.downsample
        return self.channels, side, side

    @property
    def name(self) -> str:
        """Name of the autoencoder in file names."""
        return f"{self.kind.lower()}_{self.channels}"

    @property
    def fingerprint(self) -> str:
        """sha256 of the kind and all weights, which decide the decoded images."""
        return self._hash(self.state_dict())

    @property
    def latent_fingerprint(self) -> str:
        """sha256 of the kind and the weights that decide the latents. Caches and networks store it.

        Autoencoders that differ only in the decoder have the same, and networks can be exchanged between them.
        """
        return self.fingerprint

    def _hash(self, tensors: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256(f"{self.kind} {self.channels} {self.downsample}".encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return rearrange(values, "c -> 1 c 1 1")
