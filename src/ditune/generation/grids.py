"""Grids of images for people to look at: uint8 (N, 3, H, W) -> PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:  # the import takes seconds, and grids need no feature extractor
    from ditune.metrics.features import ImageSet

TILE = 128  # pixels: smaller images are enlarged by the largest whole factor that stays within this
BACKGROUND = (232, 232, 232)  # not white: many images are, and their edges should be seen
INK = (32, 32, 32)
FONT_SIZE = 13
LINE = 18  # height of a line of text, pixels


def tiles(images: Tensor) -> list[Image.Image]:
    """One PIL image each, small ones enlarged by a whole factor without smoothing."""
    factor = max(1, TILE // max(images.shape[-2:]))
    images = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
    return [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]


def fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, shortened with dots to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], pad: int, captions: Sequence[str] = ()) -> Image.Image:
    """Rows of (image, text under it); a caption stands over each row. Space for text is left only where there is some.

    All images have the same size.
    """
    font = ImageFont.load_default(FONT_SIZE)
    width, height = rows[0][0][0].size
    below = LINE if any(text for row in rows for _, text in row) else 0
    above = LINE if captions else 0
    step_x, step_y = width + pad, above + height + below + pad
    canvas = Image.new("RGB", (step_x * max(map(len, rows)) + pad, step_y * len(rows) + pad), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, (row, caption) in enumerate(zip_longest(rows, captions, fillvalue="")):
        y = pad + i * step_y
        draw.text((pad, y), fit(caption, font, canvas.width - 2 * pad), INK, font)
        for j, (image, text) in enumerate(row):
            x = pad + j * step_x
            canvas.paste(image, (x, y + above))
            draw.text((x, y + above + height), fit(text, font, width), INK, font)
    return canvas


def grid(images: Tensor, columns: int, pad: int = 2, labels: Sequence[str] | None = None) -> Image.Image:
    """Images (N, 3, H, W) uint8 row by row, N >= 1, each over its label where labels (N) are given."""
    cells = list(zip(tiles(images), labels or [""] * len(images), strict=True))
    return sheet([cells[start : start + columns] for start in range(0, len(cells), columns)], pad)


def save_grid(
    path: str | Path, images: Tensor, columns: int, pad: int = 2, labels: Sequence[str] | None = None
) -> None:
    """Writes `grid` as the image file `path`; its folder is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns, pad, labels).save(path)


def neighbours_sheet(
    samples: Tensor, references: Tensor | ImageSet, index: Tensor, distance: Tensor, pad: int = 4
) -> Image.Image:
    """Each row: a sample, then its k nearest references with their distances.

    Shapes: samples (N, 3, H, W) uint8, references (M, 3, H, W) uint8 or a dataset, index and distance (N, k).
    """
    wanted = index.flatten().tolist()
    near = references[wanted] if isinstance(references, Tensor) else references.__getitems__(wanted)[0]
    near_tiles = iter(tiles(near))
    rows = []
    for sample, distances in zip(tiles(samples), distance.tolist(), strict=True):
        rows.append([(sample, "sample"), *((next(near_tiles), f"{value:.3f}") for value in distances)])
    return sheet(rows, pad)


def side_by_side(panels: dict[str, Image.Image], pad: int = 12) -> Image.Image:
    """Grids of one size beside each other, each under its name."""
    return sheet([[(panel, name) for name, panel in panels.items()]], pad)


def before_after_sheet(rows: dict[str, Tensor], pad: int = 2) -> Image.Image:
    """One captioned row of images (n, 3, H, W) uint8 for each entry, such as "before" and "after"."""
    return sheet([[(tile, "") for tile in tiles(images)] for images in rows.values()], pad, list(rows))
