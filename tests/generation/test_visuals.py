"""Sheets of pictures: every pixel in its place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from ditune.generation import grids as visuals
from ditune.generation.grids import BACKGROUND, LINE, before_after_sheet, grid, neighbours_sheet, save_grid


def flat(count: int, size: int = 64) -> Tensor:
    """Pictures of one colour each: picture i is (i, 2i, 3i)."""
    colours = torch.arange(count)[:, None] * torch.tensor([1, 2, 3])
    return colours[:, :, None, None].expand(-1, -1, size, size).to(torch.uint8)


def colour_at(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return image.getpixel((x, y))


def test_grid_places_and_enlarges_by_whole_factors():
    image = grid(flat(5), columns=3, pad=2)
    assert image.size == (3 * 130 + 2, 2 * 130 + 2)
    for i in range(5):
        corner = (2 + i % 3 * 130, 2 + i // 3 * 130)
        for offset in (0, 127):
            assert colour_at(image, corner[0] + offset, corner[1] + offset) == (i, 2 * i, 3 * i)
    assert colour_at(image, 0, 0) == colour_at(image, 300, 200) == BACKGROUND


def test_enlarging_does_not_smooth():
    picture = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    tile = np.array(grid(picture, columns=1, pad=0))
    assert np.array_equal(tile[::4, ::4], picture[0].permute(1, 2, 0).numpy())
    assert np.array_equal(tile[3::4, 3::4], tile[::4, ::4])


def test_large_pictures_keep_their_size():
    assert grid(flat(2, size=200), columns=2, pad=0).size == (400, 200)


def test_labels_take_a_line_and_are_written():
    image = grid(flat(2), columns=2, pad=0, labels=["cat", "a label that is much too long for a tile"])
    assert image.size == (256, 128 + LINE)
    strip = np.array(image)[128:]
    assert (strip != BACKGROUND[0]).any()
    assert colour_at(image, 127, 127) == (0, 0, 0), "the text does not cover the picture"
    with pytest.raises(ValueError, match="shorter"):
        grid(flat(2), columns=2, labels=["one"])


def test_long_text_is_shortened():
    font = ImageFont.load_default(visuals.FONT_SIZE)
    short = visuals.fit("x" * 100, font, 64)
    assert short.endswith("...")
    assert font.getlength(short) <= 64
    assert visuals.fit("cat", font, 64) == "cat"


def test_save_grid_makes_the_folder(tmp_path: Path):
    save_grid(tmp_path / "samples" / "step_0.png", flat(4), columns=2)
    with Image.open(tmp_path / "samples" / "step_0.png") as image:
        assert np.array_equal(np.array(image), np.array(grid(flat(4), columns=2)))


def test_neighbours_sheet_puts_references_beside_their_sample():
    index, distance = torch.tensor([[7, 2], [9, 5]]), torch.tensor([[0.01, 0.2], [0.3, 0.4]])
    image = neighbours_sheet(flat(2), flat(10), index, distance, pad=4)
    assert image.size == (3 * 132 + 4, 2 * (132 + LINE) + 4)
    for row, expected in enumerate([(0, 7, 2), (1, 9, 5)]):
        found = [colour_at(image, 4 + 132 * column, 4 + (132 + LINE) * row)[0] for column in range(3)]
        assert tuple(found) == expected

    class Set:
        def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
            return flat(10)[indices], torch.zeros(len(indices))

    assert np.array_equal(np.array(neighbours_sheet(flat(2), Set(), index, distance)), np.array(image))


def test_before_after_rows_are_captioned():
    image = before_after_sheet({"before": flat(3), "after": flat(3) + 1}, pad=2)
    assert image.size == (3 * 130 + 2, 2 * (130 + LINE) + 2)
    assert colour_at(image, 2, 2 + LINE) == (0, 0, 0)
    assert colour_at(image, 2, 2 + 130 + 2 * LINE) == (1, 1, 1)
    assert (np.array(image)[2:LINE] != BACKGROUND[0]).any()
