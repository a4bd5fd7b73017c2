"""A linear codec: the principal components of small blocks of pixels, fitted in seconds and decoded by a product."""

import json
import os
from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditune.autoencoders.base import Autoencoder
from ditune.errors import UserError

FORMAT = "ditune.patch_pca"
# Variance, in pixels of [-1, 1], that rounding to uint8 adds; a component below it is not worth amplifying.
ROUNDING_VARIANCE = (2 / 255) ** 2 / 12


class PatchPCA(Autoencoder):
    """z = W (b - mean) for every block b of patch x patch x 3 pixels; the C rows of W are orthonormal.

    channels  C, 1 .. 3 * patch**2 (then nothing is lost)
    patch     side of a block, in pixels
    weights   file of `save`; None = the block's first C numbers, to be replaced by `load_state_dict`

    Raises UserError for too many channels and for a missing, foreign or unfitting file.
    """

    kind = "PatchPCA"

    mean: Tensor
    components: Tensor

    def __init__(self, channels: int, patch: int = 4, weights: str | Path | None = None) -> None:
        numbers = 3 * patch**2  # D
        if not 1 <= channels <= numbers:
            raise UserError(
                f"Blocks of {patch} x {patch} x 3 pixels have {numbers} principal components, not {channels}. "
                f"Choose 1 to {numbers} channels, or larger blocks."
            )
        super().__init__(channels, downsample=patch)
        self.provenance: dict[str, str] = {}
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("components", torch.eye(channels, numbers))  # W (C, D)
        if weights is not None:
            self._read(Path(weights))

    def encode(self, x: Tensor) -> tuple[Tensor, None]:
        blocks = to_blocks(x, self.downsample) - self.mean  # (N, h, w, D)
        return rearrange(blocks @ self.components.T, "n h w c -> n c h w"), None

    def decode(self, z: Tensor) -> Tensor:
        blocks = rearrange(z, "n c h w -> n h w c") @ self.components + self.mean  # (N, h, w, D)
        return rearrange(blocks, "n h w (c p q) -> n c (h p) (w q)", p=self.downsample, q=self.downsample)

    @classmethod
    def fit(
        cls,
        pictures: Tensor,
        channels: int,
        patch: int = 4,
        whiten: bool = False,
        provenance: dict[str, str] | None = None,
    ) -> Self:
        """The codec with the least squared error on `pictures`, uint8 (N, 3, H, W) with H and W multiples of `patch`.

        whiten      False = one scale for all channels (mean variance 1), which keeps the order of energy of pixels;
                    True = every channel has variance 1
        provenance  what the file says about its origin, such as the fingerprint of the pictures
        """
        codec = cls(channels, patch)
        mean, covariance = moments(pictures, patch)
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        values = values.flip(0)[:channels].clamp_min(ROUNDING_VARIANCE)
        codec.mean.copy_(mean)
        codec.components.copy_(fix_signs(vectors.flip(1)[:, :channels].T))
        codec.scale.copy_((values if whiten else values.mean().expand(channels)).rsqrt())
        codec.provenance = {"whiten": str(whiten).lower(), "pictures": str(len(pictures)), **(provenance or {})}
        return codec

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with config and provenance in its metadata; a whole file or none."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        config = {"channels": self.channels, "patch": self.downsample}
        metadata = {"format": FORMAT, "config": json.dumps(config), "provenance": json.dumps(self.provenance)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary, metadata)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The codec in a file of `save`; UserError when it is missing or foreign."""
        _, config, _ = read(Path(path))
        return cls(**config, weights=path)

    def _read(self, path: Path) -> None:
        tensors, config, self.provenance = read(path)
        if config != {"channels": self.channels, "patch": self.downsample}:
            raise UserError(
                f"The codec {path} has {config['channels']} channels and blocks of {config['patch']} pixels, "
                f"not {self.channels} and {self.downsample}. Ask for these, or give another file."
            )
        self.load_state_dict(tensors)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """Tensors, config and provenance of a file of `PatchPCA.save`."""
    if not path.is_file():
        raise UserError(
            f"There is no codec at {path}. Correct the path, or fit one with PatchPCA.fit and save it there."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Copy it again, or fit it anew.") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by PatchPCA.save. Give a file that was, or fit a codec.")
    return tensors, json.loads(metadata["config"]), json.loads(metadata["provenance"])


def to_blocks(x: Tensor, patch: int) -> Tensor:
    """(N, 3, H, W) -> (N, H / patch, W / patch, D); a block's numbers in the order (channel, row, column)."""
    return rearrange(x, "n c (h p) (w q) -> n h w (c p q)", p=patch, q=patch)


def moments(pictures: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, H, W) -> mean (D,) and covariance (D, D) of its blocks in [-1, 1], float64."""
    total, squares, count = 0.0, 0.0, 0
    for chunk in pictures.split(256):
        blocks = rearrange(to_blocks(chunk.double() / 127.5 - 1, patch), "n h w d -> (n h w) d")
        total, squares, count = total + blocks.sum(0), squares + blocks.T @ blocks, count + len(blocks)
    mean = total / count
    return mean, squares / count - torch.outer(mean, mean)


def fix_signs(components: Tensor) -> Tensor:
    """Rows (C, D) so signed that the first entry of at least half the largest magnitude is positive.

    An eigenvector's sign is the library's whim. Taking the largest entry alone would leave it to rounding, since
    a component with mirror symmetry holds its largest value twice, once with each sign.
    """
    magnitude = components.abs()
    first = (magnitude >= magnitude.amax(1, keepdim=True) / 2).int().argmax(1, keepdim=True)
    return components * components.gather(1, first).sign()
