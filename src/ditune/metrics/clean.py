"""The resize of clean-fid and of dgm-eval's --clean_resize: bicubic, antialiased, on floats, by Pillow.

An image in 8 bits would be rounded after the resize; other libraries' bicubic kernels do not antialias, or are others
(Parmar et al. 2022, arXiv 2104.11222).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLEAN = "bicubic of Pillow on floats"  # in the identity of extractors
THREADS = 8  # Pillow resizes without Python's lock


def clean_resize(images: Tensor, side: int) -> Tensor:  # (N, 3, side, side) float32 in 0..255
    """Resize each channel as a float image, and clip what the kernel overshoots.

    Args:
        images: uint8 (N, 3, H, W), on any device; the result is on the same.
        side: in pixels.
    """
    planes = images.cpu().float().flatten(0, 1).numpy()  # (3N, H, W)
    with ThreadPoolExecutor(THREADS) as pool:
        resized = list(pool.map(lambda plane: _resize(plane, side), planes))
    return torch.from_numpy(np.stack(resized)).view(len(images), -1, side, side).to(images.device)


def _resize(plane: np.ndarray, side: int) -> np.ndarray:  # (H, W) -> (side, side) float32
    return np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255)
