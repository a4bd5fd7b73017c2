"""Pictures -> feature vectors. Distances carry the extractor's name: those of two extractors are not comparable."""

import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.progress import meter


class PictureSet(Protocol):
    """What the metrics need of a data set; `ditune.data.Pictures` is one."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]: ...  # (B, 3, H, W) uint8, (B,) labels


class Extractor(Protocol):
    """A frozen network that makes features: uint8 (N, 3, H, W) -> float32 (N, D)."""

    name: str  # in the names of its distances
    columns: dict[str, slice]  # of its output; "features" are what sets are compared by
    identity: dict[str, str | int]  # everything that changes the features

    def __call__(self, pictures: Tensor) -> Tensor: ...


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No TF32 and no autocast: they would make a distance depend on the machine and on the caller."""
    precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), precise:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class EfficientNetLite0(nn.Module):
    """ImageNet features of timm's `tf_efficientnet_lite0`: uint8 (N, 3, H, W) RGB -> float32 (N, 1280).

    Pictures are resized to `resolution` (bicubic, no antialiasing, clamped to [0, 1]), scaled by (x - 0.5) / 0.5 and
    averaged over the last feature map. The weights are a safetensors file, stored in float16 and used in float32.
    Raises UserError when the file is missing or its SHA-256 is not `sha256`.

    Source: Tan & Le 2019, arXiv 1905.11946 (EfficientNet); the Lite variant is of TensorFlow's TPU repository.
    """

    name = "efflite0"
    channels = 1280
    columns = {"features": slice(None)}  # noqa: RUF012

    def __init__(self, weights: str | Path, sha256: str, resolution: int = 128) -> None:
        super().__init__()
        remedy = "Copy it again from assets/extractors/ of the DiTune repository (see assets/README.md)."
        check_file(Path(weights), sha256, remedy)
        self.sha256 = sha256
        self.resolution = resolution
        import timm  # takes seconds, and most commands do without

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        state = load_file(weights)
        self.network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        # channels_last: 1.4 to 1.7 times faster on a CPU, the convolutions are depthwise
        self.network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.eval()

    @property
    def identity(self) -> dict[str, str | int]:
        """Everything that changes the features; kept in the header of cached features."""
        return {"extractor": self.name, "sha256": self.sha256, "resolution": self.resolution, "resize": "bicubic"}

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stays in evaluation mode: a parent's train() must not switch the batch norm's statistics."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        if pictures.dtype != torch.uint8:
            raise TypeError(f"The extractor reads uint8 pictures, not {pictures.dtype}.")
        with exact(pictures.device):
            x = pictures.float() / 255  # (N, 3, H, W)
            size = (self.resolution, self.resolution)
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=False).clamp(0, 1)
            x = ((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
            x = self.network.forward_features(x)  # (N, 1280, resolution / 32, resolution / 32)
            return self.network.forward_head(x, pre_logits=True)  # (N, 1280)


def check_file(path: Path, sha256: str, remedy: str) -> None:
    """Raises UserError with the `remedy` unless `path` is a file with this SHA-256 (hex)."""
    if not path.is_file():
        raise UserError(
            f"The feature extractor's weights are missing: {path} is not a file (SHA-256 {sha256}). {remedy}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"The feature extractor's weights in {path} have SHA-256 {found}, expected {sha256}. {remedy}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth file on the CPU; no pickle is executed.

    Raises:
        UserError: it is damaged or holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} holds something else than tensors, or is damaged. Download it again.") from error


@torch.inference_mode()
def extract(extractor: nn.Module, pictures: Tensor | PictureSet, batch_size: int = 64) -> Tensor:
    """Features of uint8 pictures (N, 3, H, W), or of a data set in its own order: float32 (N, D) on the CPU.

    Every batch has `batch_size` rows, the last one is padded: convolution kernels are chosen by batch size, so
    otherwise a picture's features would depend on how many others there are.
    Raises UserError when there are no pictures.
    """
    count = len(pictures)
    if count == 0:
        raise UserError("There are no pictures to compare. Draw some, or name a folder that holds pictures.")
    weight = next(extractor.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    features = []
    with meter("extracting features", count) as progress:
        for start in range(0, count, batch_size):
            indices = list(range(start, min(start + batch_size, count)))
            batch = pictures[indices] if isinstance(pictures, Tensor) else pictures.__getitems__(indices)[0]
            padding = batch[-1:].expand(batch_size - len(batch), *batch.shape[1:])
            features.append(extractor(torch.cat([batch, padding]).to(device))[: len(batch)].cpu())
            progress.advance(len(indices))
    return torch.cat(features)  # (N, D)
