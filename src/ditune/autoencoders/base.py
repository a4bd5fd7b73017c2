"""The one interface between pixels, float (N, 3, H, W) in [-1, 1], and the latents that a network learns."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, final

import torch
from einops import rearrange
from torch import Tensor, nn

from ditune.errors import UserError


class Autoencoder(nn.Module, ABC):
    """A codec and the shift and scale that bring its latents to about unit variance.

    channels    C of the latents
    downsample  pixels per latent along each side
    shift       (C,) buffer, subtracted from the codec's latents
    scale       (C,) buffer, multiplied after that
    """

    kind: ClassVar[str]  # in fingerprints, which stored files name; the class may be renamed
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
        """Pixels (N, 3, H, W) -> mean and log-variance (N, C, h, w) of the codec; None when it is deterministic."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents of the codec (N, C, h, w) -> pixels (N, 3, H, W), not clamped."""

    @final
    def to_latent(self, x: Tensor, normal: Callable[[Sequence[int]], Tensor] | None = None) -> Tensor:
        """Pixels (N, 3, H, W) -> (N, C, h, w) for the network.

        The posterior's mean, or a sample where `normal`, (C, h, w) -> standard normal (N, C, h, w), is given.
        """
        return self.from_moments(*self.encode(x), normal)

    @final
    def from_moments(
        self, mean: Tensor, logvar: Tensor | None, normal: Callable[[Sequence[int]], Tensor] | None = None
    ) -> Tensor:
        """What `encode` gives, perhaps long ago -> (N, C, h, w) for the network; `normal` as in `to_latent`."""
        z = mean
        if normal is not None and logvar is not None:
            z = z + torch.exp(logvar / 2) * normal(z.shape[1:])
        return (z - self._per_channel(self.shift)) * self._per_channel(self.scale)

    @final
    def to_pixels(self, z: Tensor) -> Tensor:
        """The network's (N, C, h, w) -> pixels (N, 3, H, W), not clamped; inverts `to_latent` up to the codec."""
        return self.decode(z / self._per_channel(self.scale) + self._per_channel(self.shift))

    @final
    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of pictures with this side; UserError when blocks of `downsample` pixels do not fill it."""
        if resolution % self.downsample:
            raise UserError(
                f"Pictures of {resolution} pixels do not divide into blocks of {self.downsample}. "
                f"Choose a resolution that is a multiple of {self.downsample}."
            )
        side = resolution // self.downsample
        return self.channels, side, side

    @property
    def name(self) -> str:
        """For the names of files."""
        return f"{self.kind.lower()}_{self.channels}"

    @property
    def fingerprint(self) -> str:
        """sha256 of the kind and all numbers: what decides how pictures look."""
        return self._hash(self.state_dict())

    @property
    def latent_fingerprint(self) -> str:
        """sha256 of what decides the latents, by which caches and networks name the codec that they belong to.

        Codecs that differ in nothing but the decoder have the same, and exchange networks.
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
