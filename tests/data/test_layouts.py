"""How folders and zip files are read: names of splits, wrapping folders, metadata, links, what is left out."""

import json

import pytest
from PIL import Image

from ditune.data import ImageDataset
from ditune.data.formats import endings, is_hidden, is_image, left_out
from ditune.data.sources import open_source
from ditune.data.splits import hashed_split, normal_split
from ditune.errors import UserError
from small_datasets import COLOURS, make, png, tree

CLASSES = sorted(COLOURS)
BOTH = pytest.mark.parametrize("place", ["pictures", "pictures.zip"])


def lines(*rows: dict[str, object]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


# Splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train", "train"), ("Training", "train"), ("VAL", "val"), ("valid", "val"), ("Validation", "val")),
        *(
            ("dev", "val"),
            ("test", "test"),
            ("Testing", "test"),
            ("eval", "test"),
            ("fold1", "fold1"),
            ("Fold", "Fold"),
        ),
    ],
)
def test_splits_have_usual_names(name, split):
    assert normal_split(name) == split


@BOTH
@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        *(("train", "validation", "val"), ("train", "valid", "val"), ("Train", "Test", "test")),
        *(("training", "testing", "test"), ("TRAIN", "dev", "val"), ("train", "eval", "test")),
    ],
)
def test_folders_of_splits_in_any_spelling(tmp_path, place, train, other, split):
    path = make(tmp_path / place, tree(f"{train}/", count=20) | tree(f"{other}/", count=1))
    assert ImageDataset(path, 8, "train").class_names == CLASSES
    assert len(ImageDataset(path, 8, "train")) == 60
    assert ImageDataset(path, 8, split).names == [f"{other}/{name}/0.png" for name in CLASSES]
    assert len(ImageDataset(path, 8, other)) == 3  # as it is spelled on disk
    assert len(ImageDataset(path, 8, "train.fit")) + len(ImageDataset(path, 8, "train.val")) == 60


def test_val_stands_in_for_test_with_a_warning(tmp_path, caplog):
    path = make(tmp_path / "a", tree("train/") | tree("val/", count=1))
    assert ImageDataset(path, 8, "test").names == ImageDataset(path, 8, "val").names
    assert "no split 'test' in the data; its split 'val' is used" in caplog.text
    path = make(tmp_path / "b", tree("train/") | tree("test/", count=1))
    with pytest.raises(UserError, match="have these splits: test, train"):
        ImageDataset(path, 8, "val")  # to search settings on the test split would be wrong


@BOTH
def test_train_alone_is_a_split_and_a_tenth_of_it_is_test(tmp_path, place):
    pictures = ImageDataset(make(tmp_path / place, tree("train/", count=40)), 8, "train")
    test = ImageDataset(tmp_path / place, 8, "test")
    assert pictures.class_names == CLASSES
    assert len(pictures) + len(test) == 120
    assert test.names == [name for name in ImageDataset(tmp_path / place, 8).names if hashed_split(name) == "test"]
    assert "There is only train/" in pictures.notes[0]


@BOTH
def test_images_without_class_folders_are_one_class(tmp_path, place):
    path = make(tmp_path / place, {"train/0.png": png(), "train/1.png": png(), "Test/0.png": png()})
    assert ImageDataset(path, 8, "train").class_names == ["all"]
    assert ImageDataset(path, 8, "test").names == ["Test/0.png"]


@BOTH
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (tree("train/") | tree("extra/"), r"'train' are names of splits, and the folder 'extra' lies beside"),
        ({f"{name}/0.png": b"" for name in ("bus", "test", "train")}, r"'test' and 'train' .* the folder 'bus'"),
        (tree("train/") | {"stray.png": png()}, r"'train' .* the image stray\.png"),
        (tree("train/") | tree("training/"), "'train' and 'training' in .* both name the split 'train'"),
        (tree("val/") | tree("Valid/"), "'Valid' and 'val' in .* both name the split 'val'"),
        (tree("train/") | {"test/0.png": png()}, r"test/0\.png .* in no folder of a class, while train/ has them"),
        (tree("train/") | {"train/0.png": png()}, r"train/0\.png .* beside the folders of the classes"),
        (tree("train/train/") | tree("test/test/"), r"would be named test, train"),
    ],
)
def test_layouts_that_mean_two_things_are_refused(tmp_path, place, files, message):
    with pytest.raises(UserError, match=message):
        ImageDataset(make(tmp_path / place, files), 8)


def test_classes_named_like_splits_are_listed(tmp_path):
    names = ["bus", "test", "train"]
    path = make(tmp_path, {f"{name}/{i}.png": png() for name in names for i in range(3)})
    assert ImageDataset(path, 8, "train", classes=names).class_names == names


# Folders around everything


@pytest.mark.parametrize(
    "files",
    [
        tree("my set/"),
        tree("a/b/"),
        tree("my set/train/") | tree("my set/Test/"),
        tree("my set/") | {"README.md": b"", "my set/LICENSE": b""},
    ],
)
def test_folders_around_everything_are_left_out_of_folders_as_of_zips(tmp_path, files):
    folder, archive = (ImageDataset(make(tmp_path / place, files), 8, "train") for place in ("x", "x.zip"))
    assert folder.class_names == CLASSES
    assert folder.fingerprint == archive.fingerprint
    assert "stands for the whole and is no class" in folder.notes[0]
    assert folder.not_images == archive.not_images


def test_names_keep_their_path_where_nothing_is_around(tmp_path):
    assert ImageDataset(make(tmp_path / "a", {"cat/0.png": png()}), 8).class_names == ["cat"]
    assert ImageDataset(make(tmp_path / "b", {"cat/x/0.png": png()}), 8, classes=["cat"]).class_names == ["cat"]
    assert open_source(make(tmp_path / "c", tree("train/"))).names[0] == "train/cat/0.png"


# Metadata


TABLES = {
    "csv": b"file_name,label\na.png,x\nb.png,y\n",
    "jsonl": lines({"file_name": "a.png", "label": "x"}, {"file_name": "b.png", "label": "y"}),
}


@BOTH
@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.csv", "METADATA.CSV", "metadata.jsonl", "MetaData.JSONL"])
@pytest.mark.parametrize("around", ["", "my set/"])
def test_metadata_in_any_case_and_both_formats(tmp_path, place, name, around):
    files = {f"{around}{name}": TABLES[name.rpartition(".")[2].lower()]}
    files |= {f"{around}a.png": png(), f"{around}b.png": png(), f"{around}c.png": png()}
    pictures = ImageDataset(make(tmp_path / place, files), 8, class_column="label")
    assert pictures.names == ["a.png", "b.png"]
    assert pictures.class_names == ["x", "y"]
    assert any(f"because {name} does not name them: 1 (c.png)" in note for note in pictures.notes)


@BOTH
@pytest.mark.parametrize("around", ["", "my set/"])
def test_one_table_for_each_split(tmp_path, place, around):
    files = {
        f"{around}{split}/{file}": content
        for split, name, kind in (("train", "metadata.csv", "csv"), ("validation", "Metadata.jsonl", "jsonl"))
        for file, content in {name: TABLES[kind], "a.png": png(), "b.png": png()}.items()
    }
    path = make(tmp_path / place, files)
    train, val = (ImageDataset(path, 8, split, class_column="label") for split in ("train", "val"))
    assert train.names == ["train/a.png", "train/b.png"]
    assert val.names == ["validation/a.png", "validation/b.png"]
    assert train.class_names == ["x", "y"]
    assert ImageDataset(path, 8, "val").class_names == ["all"]  # no column is asked for


def test_one_table_for_folders_that_are_splits(tmp_path):
    files = {
        "metadata.csv": b"file_name,label\ntrain/a.png,x\ntest/b.png,x\n",
        "train/a.png": png(),
        "test/b.png": png(),
    }
    assert ImageDataset(make(tmp_path, files), 8, "test", class_column="label").names == ["test/b.png"]


def test_values_become_text_and_splits_get_their_usual_names(tmp_path):
    rows = [
        {"file_name": "a.png", "label": 3, "split": "Training"},
        {"file_name": "./b.png", "label": 10, "split": "validation", "score": 0.5, "boxes": [1, 2], "note": None},
    ]
    pictures = ImageDataset(
        make(tmp_path, {"metadata.jsonl": lines(*rows), "a.png": png(), "b.png": png()}), 8, "val", "label"
    )
    assert pictures.class_names == ["10", "3"]
    values = {
        "file_name": "./b.png",
        "label": "10",
        "split": "validation",
        "score": "0.5",
        "boxes": "[1, 2]",
        "note": "",
    }
    assert pictures.rows == [values | {"note": ""}]


@BOTH
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (tree(), "column 'label', but there is no metadata.csv or metadata.jsonl .* There are: cat/, dog/, eel/"),
        ({"labels.csv": b"", "a.png": png()}, r"There are: labels\.csv, a\.png"),
        (
            {"metadata.jsonl": lines({"file_name": "a.png"}), "a.png": png()},
            "no column 'label'. It has",
        ),
        ({"metadata.jsonl": b'\n{"file_name": \n', "a.png": png()}, "Line 2 of metadata.jsonl in .* is no JSON"),
        ({"metadata.jsonl": b"[1]\n", "a.png": png()}, "Line 1 of metadata.jsonl in .* is no JSON object"),
        ({"Metadata.csv": b"", "metadata.jsonl": b"", "a.png": png()}, "holds Metadata.csv and metadata.jsonl"),
        (
            {"train/metadata.csv": b"file_name,label\na.png,x\n", "train/a.png": png(), "test/a.png": png()},
            r"the folder 'test' in .* has no metadata, while there is train/metadata\.csv",
        ),
        (
            {"metadata.jsonl": lines({"file_name": "a.png", "label": "x"}, {"file_name": "a.png"}), "a.png": png()},
            "Row 2 of metadata.jsonl in .* has nothing in the column 'label'",
        ),
    ],
)
def test_a_column_that_cannot_be_read_is_refused(tmp_path, place, files, message):
    with pytest.raises(UserError, match=message):
        ImageDataset(make(tmp_path / place, files), 8, class_column="label")


def test_the_top_table_holds_before_those_of_folders(tmp_path):
    files = {"metadata.csv": b"file_name,label\ntrain/a.png,x\n", "train/metadata.csv": b"", "train/a.png": png()}
    pictures = ImageDataset(make(tmp_path, files), 8, class_column="label")
    assert pictures.class_names == ["x"]
    assert any("train/metadata.csv in" in note and "is not read" in note for note in pictures.notes)


# What is left out


@BOTH
def test_files_that_are_no_images_are_counted(tmp_path, place):
    extra = {"cat/a.txt": b"", "cat/b.TXT": b"", "dog/photo.HEIC": b"", "LICENSE": b"", "dog/x.pdf": b""}
    pictures = ImageDataset(make(tmp_path / place, tree() | extra), 8)
    assert pictures.names == ImageDataset(make(tmp_path / f"plain{place}", tree()), 8).names
    kinds = {".txt": 2, ".pdf": 1, "without ending": 1}
    if ".heic" in endings():
        pytest.skip("pillow-heif is installed, and .heic is an image here")
    assert pictures.not_images == kinds | {".heic": 1}
    assert "5 files are no images: .txt 2, .heic 1, .pdf 1, without ending 1" in pictures.notes[0]
    assert "run `pip install pillow-heif`" in pictures.notes[0]


def test_formats_that_pillow_reads_are_images():
    for name in ("a.PNG", "b.jfif", "c.JPE", "d.jp2", "e.webp", "f.ppm", "g.gif", "h.tiff", "i.bmp"):
        assert is_image(name), name
    for name in ("a.pdf", "b.eps", "c.ps", "d.svg", "e.txt", "f", "g.png.part", "h.wmf", "i.h5", "j.pfm"):
        assert not is_image(name), name
    assert left_out("x", {}) == []


@pytest.mark.parametrize("suffix", ["avif", "jfif", "jpe", "jp2", "tga", "qoi"])
def test_formats_of_today_are_read(tmp_path, suffix):
    name = tmp_path / f"cat.{suffix.upper()}"
    if not is_image(name.name):
        pytest.skip(f"this Pillow reads no .{suffix}")
    try:
        Image.new("RGB", (16, 16), (200, 30, 30)).save(name)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no .{suffix}")
    found = ImageDataset(tmp_path, 16)[0][0][:, 8, 8].int()
    assert (found - found.new_tensor([200, 30, 30])).abs().max() < 9


def test_an_image_never_starts_another_program(tmp_path):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="cannot be read"):
        ImageDataset(make(tmp_path, {"cat/0.png": content}), 8)[0]


@BOTH
def test_files_of_systems_are_passed_over_silently(tmp_path, place):
    extra = {
        f"{folder}/thumb.jpg": b""
        for folder in (
            *("@eaDir", "cat/@eaDir", "__MACOSX/cat", "dog/.ipynb_checkpoints", "$RECYCLE.BIN/x"),
            *("System Volume Information", "lost+found", "#recycle", ".git"),
        )
    }
    extra |= {"cat/Thumbs.db": b"", "desktop.ini": b"", ".DS_Store": b"", "cat/._0.png": b""}
    pictures = ImageDataset(make(tmp_path / place, tree() | extra), 8)
    assert pictures.class_names == CLASSES
    assert len(pictures) == 9
    assert pictures.notes == []
    assert is_hidden("a/._x.tar.gz")


# Classes


def owl() -> str:
    """Name of an image that a hash of its path puts into the test split."""
    return next(name for i in range(999) if hashed_split(name := f"owl/{i}.png") == "test")


def test_every_class_keeps_an_image_in_training(tmp_path):
    path = make(tmp_path / "a", tree() | {owl(): png()})
    train = ImageDataset(path, 8, "train")
    assert owl() in train.names
    assert train.untrained == []
    more = make(tmp_path / "b", {"owl/trained.png": png(), owl(): png()})
    assert hashed_split("owl/trained.png") == "train"
    assert ImageDataset(more, 8, "test").names == [owl()]  # nothing changes where the class has a training image
    assert [name for name in ImageDataset([path, more], 8, "test").names if name == owl()] == [owl(), owl()]


def test_classes_without_training_images_are_said(tmp_path):
    path = make(tmp_path / "a", tree("train/") | {"test/owl/0.png": png()})
    for split in ("train", "test", None):
        pictures = ImageDataset(path, 8, split, classes=[*CLASSES, "owl", "horse"])
        assert pictures.untrained == ["owl"]
        assert "1 of 5 classes has no image at all and will not be learned: horse." in pictures.notes
        assert "1 of 5 classes has no training image and will not be learned: owl." in pictures.notes


def test_a_class_twice_in_classes_is_refused(tmp_path):
    path = make(tmp_path / "a", tree())
    (tmp_path / "classes.txt").write_text("\ufeffcat\n\ndog\neel\ncat\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"'cat' in line 5 of .*classes\.txt is there already, in line 1"):
        ImageDataset(path, 8, classes=tmp_path / "classes.txt")
    with pytest.raises(UserError, match="'cat' in place 3 of `classes` is there already, in place 1"):
        ImageDataset(path, 8, classes=["cat", "dog", "cat"])


def test_classes_are_described_in_a_line(tmp_path):
    assert ImageDataset(make(tmp_path / "a", tree()), 8).describe_classes() == "3 classes: cat 3, dog 3, eel 3"
    many = {f"c{i:02}/{j}.png": png() for i in range(12) for j in range(1 if i == 11 else 2)}
    described = ImageDataset(make(tmp_path / "b", many), 8).describe_classes()
    assert described.startswith("12 classes: c00 2, c01 2, ")
    assert described.endswith("c09 2 and 2 more; the smallest is c11 with 1")
    assert ImageDataset(make(tmp_path / "c", {"a.png": png()}), 8).describe_classes() == "1 class: all 1"
