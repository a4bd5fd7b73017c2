"""Image files to the square RGB images that networks and metrics read, and the two number formats of pixels.

Pixels are float (N, 3, H, W) in [-1, 1]; images are uint8 (N, 3, H, W). Colour profiles (ICC) are not applied.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ditune.data.formats import decoders

WIDE = 16  # a longer side of more than so many shorter ones is cropped before it is enlarged
MARGIN = 8  # pixels around the middle that the bicubic filter may read; it reads 4 at the most


def decode(content: bytes, resolution: int) -> Tensor:
    """Decode and crop an image.

    Args:
        content: bytes of the file.
        resolution: R, side of the crop in pixels.

    Returns:
        uint8 (3, R, R).

    Raises:
        Exception: one of `ditune.data.images.BROKEN`, if the bytes are no image.
    """
    with Image.open(io.BytesIO(content), formats=decoders()) as image:
        square = center_crop(to_rgb(image), resolution)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()  # (3, R, R)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM, on which published FID tables of ImageNet rest.

    Args:
        image: of any width and height, RGB or L.
        size: side of the crop, in pixels.

    Returns:
        A size x size image; an image that has this size already is unchanged.

    Source: Dhariwal & Nichol 2021, arXiv 2105.05233.
    """
    # Halving by box filters first keeps the bicubic step below a factor of two, where it does not alias.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if max(width, height) > WIDE * size:
        return _middle(image, size, width, height)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _middle(image: Image.Image, size: int, width: int, height: int) -> Image.Image:
    """The middle of a very long image as if all of it were resized to (width, height), at the cost of the middle."""
    x, y = image.width / width, image.height / height  # pixels of the source for one of the result
    left, top = (width - size) // 2 * x, (height - size) // 2 * y
    right, bottom = min(left + size * x, image.width), min(top + size * y, image.height)
    first = max(int(left) - MARGIN, 0), max(int(top) - MARGIN, 0)
    last = min(int(right) + MARGIN, image.width), min(int(bottom) + MARGIN, image.height)
    image = image.crop((*first, *last))
    # Two passes in the order that Pillow takes for a whole that is enlarged: for a part it may choose the other one,
    # as it may for a whole that shrinks; then values are rounded between the passes at other places.
    sides = (left - first[0], 0, right - first[0], image.height)
    image = image.resize((size, image.height), Image.Resampling.BICUBIC, sides)
    return image.resize((size, size), Image.Resampling.BICUBIC, (0, top - first[1], size, bottom - first[1]))


def to_rgb(image: Image.Image, background: int = 255) -> Image.Image:
    """Convert any image to RGB: rotated as its EXIF tag says, 16 bits to 8, transparency on a plain background.

    Args:
        image: in any mode of Pillow.
        background: gray value, 0 to 255.

    Raises:
        ValueError: the pixels are floating-point numbers, whose white is unknown, or Pillow cannot convert the mode.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white")
    if image.mode.startswith("I"):  # I;16, I;16B, and I, in which some formats deliver 16 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (background,) * 3)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def to_uint8(x: Tensor) -> Tensor:
    """Float pixels in [-1, 1] (clamped) -> uint8 of the same shape; inverts `from_uint8` exactly."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """uint8 images -> float32 pixels in [-1, 1] of the same shape."""
    return x.float() / 127.5 - 1
