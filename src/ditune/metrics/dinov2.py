"""DINOv2, whose distances follow people's judgement better than Inception's (Stein et al. 2023, arXiv 2306.04675)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditune.errors import require
from ditune.files.needs import Addresses, Need
from ditune.metrics.clean import CLEAN, clean_resize
from ditune.metrics.features import FrozenExtractor, check_file, read_tensors, remedy_of, weights_need

RESOLUTION, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class DINOv2(FrozenExtractor):
    """Class token of DINOv2 after the last norm: uint8 (N, 3, H, W) -> float32 (N, D), D = 1024 for ViT-L/14.

    Images are resized to 224 (bicubic, antialiased).

    Args:
        weights: the authors' .pth file, whose tensors are read; no pickle is executed.
        sha256: of that file.
        architecture: timm's name of the network.
        resize: "torch" as above; "clean" by `clean_resize`, as dgm-eval has it. The name is dinov2_clean then.

    Raises:
        UserError: the file is missing or another one, or there is no such resize.

    Source: Oquab et al. 2023, arXiv 2304.07193.
    """

    name = "dinov2"
    width = 1024  # of ViT-L/14

    def __init__(
        self,
        weights: str | Path,
        sha256: str,
        architecture: str = "vit_large_patch14_dinov2",
        resize: str = "torch",
    ) -> None:
        super().__init__()
        require(resize in ("torch", "clean"), "metrics.judge.extractor.resize", resize, "Choose torch or clean.")
        self.resize = resize
        if resize == "clean":
            self.name = "dinov2_clean"
        check_file(Path(weights), sha256, remedy_of("dinov2"))
        self.sha256, self.architecture = sha256, architecture
        state = read_tensors(Path(weights))
        import timm  # takes seconds, and most commands do without

        self.network = timm.create_model(architecture, pretrained=False, img_size=RESOLUTION)
        state.pop("mask_token", None)  # of its training
        state["pos_embed"] = resize_positions(state["pos_embed"], RESOLUTION // PATCH)
        self.network.load_state_dict(state)
        self.network.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.eval()

    @classmethod
    def needs(cls, config: Mapping[str, Any], addresses: Addresses) -> list[Need]:
        """The weights; see `ditune.files.needs`."""
        return [weights_need("dinov2", "the feature extractor DINOv2", config, addresses)]

    @property
    def identity(self) -> dict[str, str | int]:
        """Everything that changes the features; kept in the header of cached features."""
        identity = {"extractor": self.name, "sha256": self.sha256, "architecture": self.architecture}
        return identity | {
            "resolution": RESOLUTION,
            "resize": "bicubic, antialiased" if self.resize == "torch" else CLEAN,
        }

    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, D)."""
        if self.resize == "clean":
            x = clean_resize(images, RESOLUTION) / 255
        else:
            size = (RESOLUTION, RESOLUTION)
            x = F.interpolate(images.float() / 255, size, mode="bicubic", align_corners=False, antialias=True)
        return self.network.forward_features((x.clamp(0, 1) - self.mean) / self.std)[:, 0]  # (N, D)


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Resize a position table, bicubic, by the factor (side + 0.1) / S, as DINOv2's own code does.

    Args:
        table: (1, 1 + S^2, D), the class token first.
        side: patches along each side of the resized table.

    Returns:
        (1, 1 + side^2, D).
    """
    own = round((table.shape[1] - 1) ** 0.5)
    if own == side:
        return table
    grid = table[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    factor = (side + 0.1) / own
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
