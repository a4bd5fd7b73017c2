"""Images: the ADM crop, odd kinds of files, sources, splits, errors, worker processes."""

import copy
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ditune.data import ImageDataset, center_crop, from_uint8, to_rgb, to_uint8
from ditune.errors import UserError
from small_datasets import COLOURS, identity, make, png, table, tree

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "assets" / "emoji"
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "center_crop.safetensors")


def emoji(vendor: str, split: str | None = None, **kwargs: object) -> ImageDataset:
    return ImageDataset(
        EMOJI / f"{vendor}.zip", 64, split, class_column="subcategory", classes=EMOJI / "classes.txt", **kwargs
    )


@pytest.mark.parametrize("name", [name for name in GOLDEN if ".out_" in name])
def test_center_crop_equals_the_reference_bit_for_bit(name: str) -> None:
    tag, size = name.split(".out_")
    image = Image.fromarray(GOLDEN[f"{tag}.in"].numpy())
    np.testing.assert_array_equal(np.asarray(center_crop(image, int(size))), GOLDEN[name].numpy())


def test_image_of_the_asked_size_is_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(pixels), 32)), pixels)


def test_uint8_round_trip_is_exact_and_clamps() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-2.0, -1.0, 1.0, 2.0])).tolist() == [0, 0, 255, 255]


def odd_images() -> dict[str, tuple[Image.Image, tuple[int, int, int]]]:
    palette = Image.new("RGB", (4, 4), (255, 0, 0)).quantize(4)
    return {
        "gray": (Image.new("L", (4, 4), 77), (77, 77, 77)),
        "bilevel": (Image.new("1", (4, 4), 1), (255, 255, 255)),
        "cmyk": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        "palette": (palette, (255, 0, 0)),
        "16 bit": (Image.fromarray(np.full((4, 4), 200 * 257, np.uint16)), (200, 200, 200)),
        "32 bit": (Image.fromarray(np.full((4, 4), 200 * 257, np.int32)), (200, 200, 200)),
        "transparent": (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), (255, 255, 255)),
        "half transparent": (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
        "gray with alpha": (Image.new("LA", (4, 4), (9, 0)), (255, 255, 255)),
    }


@pytest.mark.parametrize("kind", odd_images())
def test_odd_kinds_become_rgb_on_white(kind: str) -> None:
    image, colour = odd_images()[kind]
    result = to_rgb(image)
    assert result.mode == "RGB"
    assert result.getpixel((1, 1)) == colour


def test_transparent_palette_entry_becomes_background(tmp_path: Path) -> None:
    Image.new("P", (4, 4), 0).save(tmp_path / "a.gif", transparency=0)
    with Image.open(tmp_path / "a.gif") as image:
        assert to_rgb(image, background=40).getpixel((0, 0)) == (40, 40, 40)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_from_a_file(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(tmp_path / f"a.{suffix}")
    assert ImageDataset(tmp_path, 8)[0][0].unique().tolist() == [100]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        turned = to_rgb(stored)
    assert turned.size == (2, 4)
    assert turned.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("place", ["pictures", "pictures.zip"])
def test_folders_are_classes(tmp_path: Path, place: str) -> None:
    extra = {"__MACOSX/cat/._0.png": b"", ".hidden/a.png": b"", "cat/notes.txt": b"", "cat/UPPER.PNG": png()}
    pictures = ImageDataset(make(tmp_path / place, tree() | extra), 8)
    assert pictures.class_names == ["cat", "dog", "eel"]
    assert pictures.names[:4] == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/UPPER.PNG"]
    assert pictures.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    batch, labels = pictures.__getitems__([9, 0])
    assert batch.shape == (2, 3, 8, 8)
    assert batch.dtype == torch.uint8
    assert labels.tolist() == [2, 0]
    assert batch[:, :, 3, 3].tolist() == [list(COLOURS["eel"]), list(COLOURS["cat"])]
    image, label = pictures[-1]
    assert torch.equal(image, batch[0])
    assert label == 2


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    folder, archive = make(tmp_path / "a", tree()), make(tmp_path / "b.zip", tree())
    one = ImageDataset(folder, 8).fingerprint
    assert one == ImageDataset(archive, 8).fingerprint
    assert one != ImageDataset(archive, 16).fingerprint
    assert one != ImageDataset(archive, 8, split="train").fingerprint
    assert one != ImageDataset(archive, 8, classes=["eel", "dog", "cat"]).fingerprint
    assert one != ImageDataset(make(tmp_path / "c", tree() | {"cat/0.png": png((1, 1, 1))}), 8).fingerprint


def test_one_folder_around_everything_in_a_zip_is_left_out(tmp_path: Path) -> None:
    assert ImageDataset(make(tmp_path / "a.zip", tree("wrapper/")), 8).class_names == ["cat", "dog", "eel"]
    assert ImageDataset(make(tmp_path / "b.zip", {"cat/0.png": png()}), 8).class_names == ["cat"]
    assert ImageDataset(make(tmp_path / "d.zip", tree("train/")), 8).class_names == ["cat", "dog", "eel"]
    assert ImageDataset(make(tmp_path / "c.zip", tree("train/") | {"test/cat/0.png": png()}), 8).num_classes == 3


def test_images_in_no_folder_are_one_class(tmp_path: Path) -> None:
    assert ImageDataset(make(tmp_path, {"a.png": png(), "b.png": png()}), 8).class_names == ["all"]


@pytest.mark.parametrize("other", ["test", "val"])
def test_top_folders_are_splits(tmp_path: Path, other: str) -> None:
    path = make(tmp_path / "a", tree("train/") | {f"{other}/dog/0.png": png()})
    held_out = ImageDataset(path, 8, split=other)
    assert held_out.names == [f"{other}/dog/0.png"]
    assert held_out.class_names == ["cat", "dog", "eel"]  # of the whole source
    assert len(ImageDataset(path, 8, split="train")) == 9
    assert len(ImageDataset(path, 8)) == 10


def test_settings_are_searched_on_a_tenth_of_the_training_images() -> None:
    archive = ROOT / "assets" / "emoji" / "fluent3d.zip"
    whole, fit, val = (ImageDataset(archive, 32, split=s).names for s in ("train", "train.fit", "train.val"))
    assert sorted(fit + val) == sorted(whole)
    assert 0.08 < len(val) / len(whole) < 0.12
    with pytest.raises(UserError, match="no image in the split"):
        ImageDataset(archive, 32, split="train.rest")


def test_hashed_split_is_a_stable_tenth(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", {f"{c}/{i}.png": b"" for c in COLOURS for i in range(200)})
    train, test = ImageDataset(path, 8, split="train"), ImageDataset(path, 8, split="test")
    assert set(train.names).isdisjoint(test.names)
    assert len(train) + len(test) == 600
    assert 40 < len(test) < 80
    assert test.names[:3] == ["cat/103.png", "cat/107.png", "cat/112.png"]


def test_metadata_gives_class_and_split(tmp_path: Path) -> None:
    rows = [
        {"file_name": "x/b.png", "kind": "10", "split": "test"},
        {"file_name": "x/a.png", "kind": "2", "split": "train"},
    ]
    files = {"metadata.csv": b"\xef\xbb\xbf" + table(rows), "x/a.png": png(), "x/b.png": png(), "x/unnamed.png": png()}
    pictures = ImageDataset(make(tmp_path, files), 8, class_column="kind")
    assert pictures.class_names == ["10", "2"]
    assert pictures.names == ["x/a.png", "x/b.png"]
    assert pictures.rows == rows[::-1]
    assert ImageDataset(tmp_path, 8, split="test", class_column="kind").labels.tolist() == [0]
    assert ImageDataset(tmp_path, 8).class_names == ["x"]


def test_sources_keep_their_order_and_limit_spreads(tmp_path: Path) -> None:
    first, second = make(tmp_path / "b", tree()), make(tmp_path / "a.zip", tree())
    both = ImageDataset([first, second], 8)
    assert both.names == ImageDataset(first, 8).names * 2
    assert ImageDataset([first, second], 8, limit=6).labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(ImageDataset(first, 8, limit=100)) == 9


def test_emoji_share_classes_and_no_codepoint_leaks() -> None:
    splits = {"train": set(), "test": set()}
    for vendor in ("noto", "twemoji", "fluent3d"):
        counts = []
        for split, codepoints in splits.items():
            pictures = emoji(vendor, split)
            counts.append(len(pictures))
            codepoints.update(row["codepoint"] for row in pictures.rows)
            assert pictures.num_classes == 98
        assert counts == ([1642, 210] if vendor == "fluent3d" else [1688, 218])
    assert splits["train"].isdisjoint(splits["test"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_workers_change_nothing(in_memory: bool) -> None:
    pictures = emoji("twemoji", "test", in_memory=in_memory, limit=50)
    expected = emoji("twemoji", "test", limit=50).load()
    for workers in (2, 0):  # first with nothing decoded in the parent
        loader = DataLoader(pictures, 16, collate_fn=identity, num_workers=workers)
        batches, labels = zip(*loader, strict=True)
        assert torch.equal(torch.cat(batches), expected)
        assert torch.equal(torch.cat(labels), pictures.labels)


def test_a_worker_sends_the_sentence_alone(tmp_path: Path) -> None:
    files = tree() | {"cat/9.png": b"no image"}
    loader = DataLoader(ImageDataset(make(tmp_path / "a.zip", files), 8), 16, collate_fn=identity, num_workers=1)
    with pytest.raises(UserError, match=r"cat/9\.png") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_that_stands_twice_in_a_zip_is_said(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", tree())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("cat/0.png", png((1, 2, 3)))
    assert any(note.endswith("the last of which counts: 1.") for note in ImageDataset(path, 8).notes)
    assert ImageDataset(path, 8)[0][0][:, 0, 0].tolist() == [1, 2, 3]


def test_copied_dataset_reads_its_zip_again() -> None:
    pictures = emoji("noto", "test", in_memory=False, limit=2)
    assert torch.equal(copy.deepcopy(pictures)[1][0], pictures[1][0])


def test_class_outside_of_classes_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a", tree())
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"eel/0\.png .* class 'eel', which is not one of the 2"):
        ImageDataset(path, 8, classes=tmp_path / "classes.txt")
    with pytest.raises(UserError, match="one a line"):
        ImageDataset(path, 8, classes=tmp_path / "missing.txt")


META = "file_name,kind,split\na.png,x,train\n"
MISTAKES = {
    "nothing at": (None, {}),
    "no images in": ({"a.txt": b"", "b/c.csv": b""}, {}),
    "no image in the split 'tset'. The sources have these splits: test, train": (
        tree("train/") | tree("test/"),
        {"split": "tset"},
    ),
    "`limit` is 0": (tree(), {"limit": 0}),
    "no column 'sort'": ({"metadata.csv": META.encode(), "a.png": png()}, {"class_column": "sort"}),
    "no column 'file_name'": ({"metadata.csv": b"file,kind\na.png,x\n", "a.png": png()}, {}),
    "names 'a.png', which is not there": ({"metadata.csv": META.encode(), "b.png": png()}, {}),
    "names '../a.png', which is not there": ({"metadata.csv": b"file_name\n../a.png\n", "b.png": png()}, {}),
    "Row 2 of metadata.csv": ({"metadata.csv": b"file_name,kind\na.png\n", "a.png": png()}, {"class_column": "kind"}),
    "metadata.csv in .* cannot be read": ({"metadata.csv": b"file_name\n\xff\xfe\n", "a.png": png()}, {}),
    "stray.png in .* beside": (tree() | {"stray.png": png()}, {}),
}


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, message: str, suffix: str) -> None:
    files, kwargs = MISTAKES[message]
    path = tmp_path / f"pictures{suffix}"
    if files is not None:
        make(path, files)
    with pytest.raises(UserError, match=message):
        ImageDataset(path, 8, **kwargs)


@pytest.mark.parametrize("place", ["pictures", "pictures.zip"])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("data", [png()[:40], b"no image", b""])
def test_broken_image_is_named(tmp_path: Path, place: str, in_memory: bool, data: bytes) -> None:
    pictures = ImageDataset(make(tmp_path / place, tree() | {"dog/bad.png": data}), 8, in_memory=in_memory)
    with pytest.raises(UserError, match=r"dog/bad\.png in .* cannot be read"):
        pictures[pictures.names.index("dog/bad.png")]


def test_flipped_bit_in_a_zip_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", {"cat/0.png": png()})
    data = path.read_bytes()
    at = data.index(b"IDAT") + 6
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(UserError, match=r"cat/0\.png"):
        ImageDataset(path, 8)[0]


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "cat/../../a.png", "..\\a.png", "C:\\a.png"])
def test_names_that_leave_the_zip_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="points outside"):
        ImageDataset(make(tmp_path / "a.zip", tree() | {name: png()}), 8)


def test_not_a_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="not a whole zip file"):
        ImageDataset(tmp_path / "a.zip", 8)


@pytest.mark.parametrize("size", [(20000, 2), (60000, 1), (1, 60000)])
def test_a_very_long_image_costs_no_more_than_its_middle(size: tuple[int, int]) -> None:
    start = time.perf_counter()
    assert center_crop(Image.new("RGB", size, (9, 99, 199)), 256).getpixel((128, 128)) == (9, 99, 199)
    assert time.perf_counter() - start < 1  # the whole would have up to 15 million pixels a row


@pytest.mark.parametrize(("width", "height"), [(400, 20), (20, 400), (1001, 7), (3, 2000), (5000, 63)])
def test_the_middle_of_a_long_image_is_that_of_the_whole(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, side = Image.fromarray(pixels), 32
    small = min(width, height)
    if small >= 2 * side:
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    whole = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    expected = np.asarray(whole.crop((left, top, left + side, top + side)), dtype=np.int64)
    found = np.asarray(center_crop(Image.fromarray(pixels), side), dtype=np.int64)
    assert np.abs(found - expected).max() <= (1 if small <= side else 32)  # noise, rounded between the passes
    assert np.abs(found - expected).mean() < 1


def test_absurdly_large_image_is_a_sentence(tmp_path: Path) -> None:
    Image.new("1", (20000, 10000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png in .* cannot be read .*decompression bomb"):
        ImageDataset(tmp_path, 8)[0]
