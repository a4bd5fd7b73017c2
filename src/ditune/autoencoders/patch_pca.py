"""A linear autoencoder: the principal components of small blocks of pixels, fitted in seconds."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditune.autoencoders.base import Autoencoder
from ditune.errors import UserError
from ditune.files.needs import Addresses, Need

FORMAT = "ditune.patch_pca"
# Variance, in pixels of [-1, 1], that rounding to uint8 adds; a component below it is not worth amplifying.
ROUNDING_VARIANCE = (2 / 255) ** 2 / 12


class PatchPCA(Autoencoder):
    """z = W (b - mean) for every block b of patch x patch x 3 pixels. The C rows of W are orthonormal.

    Args:
        channels: C, 1..3 patch^2; at the maximum it is lossless.
        patch: side of a block, in pixels.
        weights: file of `save`; None = W selects the first C numbers of a block, until `load_state_dict`.

    Raises:
        UserError: too many channels, or a file that is missing, foreign or of other sizes.
    """

    kind = "PatchPCA"

    mean: Tensor
    components: Tensor

    def __init__(self, channels: int, patch: int = 4, weights: str | Path | None = None) -> None:
        numbers = 3 * patch**2  # D
        if not 1 <= channels <= numbers:
            raise UserError(
                f"ImageShards of {patch} x {patch} x 3 pixels have {numbers} principal components, not {channels}. "
                f"Choose 1 to {numbers} channels, or larger blocks."
            )
        super().__init__(channels, downsample=patch)
        self.provenance: dict[str, str] = {}
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("components", torch.eye(channels, numbers))  # W (C, D)
        if weights is not None:
            self._read(Path(weights))

    @classmethod
    def needs(cls, config: Mapping[str, Any], addresses: Addresses) -> list[Need]:
        """The file of the weights, if one is named; see `ditune.files.needs`."""
        if config.get("weights") is None:
            return []
        path = Path(config["weights"])
        return [
            Need("autoencoder", path, path.is_file(), remedy=f"Put its weights at {path}, or set autoencoder.weights.")
        ]

    def encode(self, x: Tensor) -> tuple[Tensor, None]:
        """W (b - mean) of every block, see `Autoencoder.encode`."""
        blocks = to_blocks(x, self.downsample) - self.mean  # (N, h, w, D)
        return rearrange(blocks @ self.components.T, "n h w c -> n c h w"), None

    def decode(self, z: Tensor) -> Tensor:
        """W^T z + mean of every block, see `Autoencoder.decode`."""
        blocks = rearrange(z, "n c h w -> n h w c") @ self.components + self.mean  # (N, h, w, D)
        return rearrange(blocks, "n h w (c p q) -> n c (h p) (w q)", p=self.downsample, q=self.downsample)

    @classmethod
    def fit(
        cls,
        images: Tensor,
        channels: int,
        patch: int = 4,
        whiten: bool = False,
        provenance: dict[str, str] | None = None,
    ) -> Self:
        """The linear autoencoder with the least squared error on some images.

        Args:
            images: uint8 (N, 3, H, W) images; H and W are multiples of `patch`.
            channels: C.
            patch: side of a block, in pixels.
            whiten: True = every channel has variance 1. False = one scale for all channels (mean variance 1), which
                keeps the ratios of their energies.
            provenance: notes on its origin for the file, such as the fingerprint of the images.
        """
        fitted = cls(channels, patch)
        mean, covariance = moments(images, patch)
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        values = values.flip(0)[:channels].clamp_min(ROUNDING_VARIANCE)
        fitted.mean.copy_(mean)
        fitted.components.copy_(fix_signs(vectors.flip(1)[:, :channels].T))
        fitted.scale.copy_((values if whiten else values.mean().expand(channels)).rsqrt())
        fitted.provenance = {"whiten": str(whiten).lower(), "pictures": str(len(images)), **(provenance or {})}
        return fitted

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with config and provenance in its metadata, completely or not at all.

        Args:
            path: of the file; its folder is created.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        config = {"channels": self.channels, "patch": self.downsample}
        metadata = {"format": FORMAT, "config": json.dumps(config), "provenance": json.dumps(self.provenance)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary, metadata)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The autoencoder in a file of `save`.

        Raises:
            UserError: the file is missing, damaged or of another format.
        """
        _, config, _ = read(Path(path))
        return cls(**config, weights=path)

    def _read(self, path: Path) -> None:
        tensors, config, self.provenance = read(path)
        if config != {"channels": self.channels, "patch": self.downsample}:
            raise UserError(
                f"{path} has {config['channels']} channels and blocks of {config['patch']} pixels, "
                f"not {self.channels} and {self.downsample}. Ask for these, or give another file."
            )
        self.load_state_dict(tensors)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """Tensors, config and provenance of a file of `PatchPCA.save`.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise UserError(
            f"There is no linear autoencoder at {path}. Correct the path, or save one of PatchPCA.fit there."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Copy it again, or fit it anew.") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by PatchPCA.save. Give a file that was, or fit one.")
    return tensors, json.loads(metadata["config"]), json.loads(metadata["provenance"])


def to_blocks(x: Tensor, patch: int) -> Tensor:
    """Pixels (N, 3, H, W) to blocks (N, H / patch, W / patch, D), D in the order (channel, row, column)."""
    return rearrange(x, "n c (h p) (w q) -> n h w (c p q)", p=patch, q=patch)


def moments(images: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the blocks of images.

    Args:
        images: uint8 (N, 3, H, W) images.
        patch: side of a block, in pixels.

    Returns:
        Mean (D,) and covariance (D, D) of pixels in [-1, 1], float64.
    """
    total, squares, count = 0.0, 0.0, 0
    for chunk in images.split(256):
        blocks = rearrange(to_blocks(chunk.double() / 127.5 - 1, patch), "n h w d -> (n h w) d")
        total, squares, count = total + blocks.sum(0), squares + blocks.T @ blocks, count + len(blocks)
    mean = total / count
    return mean, squares / count - torch.outer(mean, mean)


def fix_signs(components: Tensor) -> Tensor:
    """Choose the sign of every row of (C, D): the first entry of at least half the largest magnitude is positive.

    The sign of an eigenvector is arbitrary. The largest entry alone would leave the choice to rounding, since a
    component with mirror symmetry has its largest value twice, once with each sign.
    """
    magnitude = components.abs()
    first = (magnitude >= magnitude.amax(1, keepdim=True) / 2).int().argmax(1, keepdim=True)
    return components * components.gather(1, first).sign()
