"""Images -> feature vectors. Distances carry the extractor's name: those of two extractors are not comparable."""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ditune.ahead import ahead
from ditune.errors import UserError
from ditune.files import atomic
from ditune.files.needs import Addresses, Need, published_need
from ditune.files.published import PUBLISHED
from ditune.memory import memory_for
from ditune.progress import meter

FEWER = "Set +metrics.judge.batch_size=16, or lower."  # 64 where it is not set
AHEAD = 8  # batches that are decoded while the extractor computes
BATCHES = 4  # of the extractor: one process computes so many of a set that several share


class ImageSet(Protocol):
    """What the metrics need of a dataset; `ditune.data.ImageDataset` has it."""

    fingerprint: str  # differs between datasets of different images

    def __len__(self) -> int:
        """Number of images."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8 and labels (B,) at the given positions."""


PictureSet = ImageSet  # its earlier name


class Part:
    """Some rows of an image set, read as a set of their own."""

    def __init__(self, images: ImageSet, rows: range) -> None:
        decode_once(images)
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images.__getitems__([self.rows[i] for i in indices])


def decode_once(images: Tensor | ImageSet) -> None:
    """Decode a set that is kept in memory, before several threads ask for it at once."""
    if getattr(images, "in_memory", False):
        images.load()


class Extractor(Protocol):
    """A frozen network that makes features: uint8 (N, 3, H, W) -> float32 (N, D)."""

    name: str  # in the names of its distances
    columns: dict[str, slice]  # parts of its output; distances compare the part "features"
    identity: dict[str, str | int]  # everything that changes the features

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 of images (N, 3, H, W) uint8."""


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute without TF32 and autocast, which would make a distance depend on the machine and on the caller.

    Args:
        device: where the block computes.
    """
    precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), precise:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class FrozenExtractor(nn.Module, ABC):
    """Base of the extractors: a network in evaluation mode that computes in full float32 precision.

    A subclass sets `name`, `columns` and `identity` (see `Extractor`) and implements `features`.
    """

    name: str
    columns: ClassVar[dict[str, slice]] = {"features": slice(None)}
    width: ClassVar[int | None] = None  # numbers of one image, for the plan's disk space; None = unknown

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a parent's train() must not switch the statistics of a batch norm."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8 (N, 3, H, W), RGB.

        Returns:
            float32 (N, D).

        Raises:
            TypeError: the images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"The extractor reads uint8 images, not {images.dtype}.")
        with exact(images.device):
            return self.features(images)

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """The computation inside `forward`: uint8 (N, 3, H, W) -> float32 (N, D)."""


class EfficientNetLite0(FrozenExtractor):
    """ImageNet features of timm's `tf_efficientnet_lite0`: uint8 (N, 3, H, W) RGB -> float32 (N, 1280).

    Images are resized to `resolution` (bicubic, no antialiasing, clamped to [0, 1]), scaled by (x - 0.5) / 0.5 and
    averaged over the last feature map.

    Args:
        weights: safetensors file, stored in float16 and used in float32.
        sha256: hash (hex) that the file must have.
        resolution: side in pixels that images are resized to.

    Raises:
        UserError: the file is missing or has another hash.

    Source: Tan & Le 2019, arXiv 1905.11946 (EfficientNet); the Lite variant is of TensorFlow's TPU repository.
    """

    name = "efflite0"
    channels = width = 1280

    def __init__(self, weights: str | Path, sha256: str, resolution: int = 128) -> None:
        super().__init__()
        check_file(Path(weights), sha256, SHIPPED)
        self.sha256 = sha256
        self.resolution = resolution
        import timm  # takes seconds, and most commands do without

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        state = load_file(weights)
        self.network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        # channels_last: 1.4 to 1.7 times faster on a CPU, the convolutions are depthwise
        self.network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.eval()

    @classmethod
    def needs(cls, config: Mapping[str, Any], addresses: Addresses) -> list[Need]:
        """The weights, which are shipped; see `ditune.files.needs`."""
        path = Path(config["weights"])
        remedy = f"There is no {path}. {SHIPPED}"
        return [Need("the feature extractor EfficientNet-Lite0", path, path.is_file(), remedy=remedy)]

    @property
    def identity(self) -> dict[str, str | int]:
        """Everything that changes the features; kept in the header of cached features."""
        return {"extractor": self.name, "sha256": self.sha256, "resolution": self.resolution, "resize": "bicubic"}

    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 1280)."""
        x = images.float() / 255  # (N, 3, H, W)
        size = (self.resolution, self.resolution)
        x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=False).clamp(0, 1)
        x = ((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
        x = self.network.forward_features(x)  # (N, 1280, resolution / 32, resolution / 32)
        return self.network.forward_head(x, pre_logits=True)  # (N, 1280)


SHIPPED = "Copy it again from assets/extractors/ of the DiTune repository (see assets/README.md)."


def weights_need(name: str, what: str, config: Mapping[str, Any], addresses: Addresses) -> Need:
    """The need of an extractor's weights.

    Args:
        name: in `PUBLISHED` and in the config's `addresses`.
        what: it is, for messages.
        config: of the extractor, with `weights` and `sha256`.
        addresses: of the config.
    """
    need = published_need(name, what, Path(config["weights"]), addresses)
    return replace(need, sha256=config["sha256"])


def remedy_of(name: str) -> str:
    """What to do where the published weights `name` are missing."""
    address = PUBLISHED[name].addresses[0]
    return (
        f"Download {address} and put it there, or let src/train.py or src/prepare.py with the same metrics= fetch it."
    )


def check_file(path: Path, sha256: str, remedy: str) -> None:
    """Check the weights of an extractor.

    Args:
        path: the file.
        sha256: hash (hex) that it must have.
        remedy: sentence that says how to get the right file.

    Raises:
        UserError: the file is missing or has another hash.
    """
    if not path.is_file():
        raise UserError(
            f"The feature extractor's weights are missing: {path} is not a file (SHA-256 {sha256}). {remedy}"
        )
    found = atomic.sha256(path)
    if found != sha256:
        raise UserError(f"The feature extractor's weights in {path} have SHA-256 {found}, expected {sha256}. {remedy}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth file by name, on the CPU; no pickle is executed.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} holds something else than tensors, or is damaged. Download it again.") from error


@torch.inference_mode()
def extract(
    extractor: nn.Module,
    images: Tensor | ImageSet,
    batch_size: int = 64,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Compute features batch by batch, on the extractor's device.

    Every batch has `batch_size` rows; the last one is padded. Convolution kernels are chosen by batch size, so without
    padding the features of an image would depend on how many others there are.

    Args:
        extractor: see `Extractor`.
        images: uint8 (N, 3, H, W), or a dataset, which is read in its own order.
        batch_size: rows of a batch.
        advance: gets the number of images of each batch, from a caller who shows the progress of more than these;
            None = it is shown here.

    Returns:
        Features (N, D), float32 on the CPU.

    Raises:
        UserError: there are no images.
    """
    count = len(images)
    if count == 0:
        raise UserError("There are no images to compare. Generate some, or name a folder that holds images.")
    weight = next(extractor.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    features = []

    def read(rows: range) -> Tensor:
        return images[list(rows)] if isinstance(images, Tensor) else images.__getitems__(list(rows))[0]

    decode_once(images)
    batches = (range(start, min(start + batch_size, count)) for start in range(0, count, batch_size))
    with nullcontext() if advance else meter("extracting features", count) as progress:
        for batch in ahead(read, batches, AHEAD):
            padding = batch[-1:].expand(batch_size - len(batch), *batch.shape[1:])
            with memory_for(f"the features of {batch_size} images at once", FEWER):
                features.append(extractor(torch.cat([batch, padding]).to(device))[: len(batch)].cpu())
            (advance or progress.advance)(len(batch))
    return torch.cat(features)  # (N, D)
