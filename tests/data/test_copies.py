"""What people have of the public datasets: deeper folders, re-uploads, Parquet; the same data, or refused at once."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ditune.data import CUB, SUN397, ArtBench10, Benchmark, Caltech101, Flowers102, Food101, ImageDataset, StanfordCars
from ditune.data.copies import Facts
from ditune.errors import UserError
from miniatures import put, stanford_cars_whole
from small_archives import CLASSES, class_names, make_archives, use_hashes
from small_datasets import png

NUMBER = {"artbench10": 10, "flowers102": 102}  # of classes, whose names are known; of the others a few do


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each dataset as its archives unpack."""
    folder = tmp_path_factory.mktemp("archives")
    for name, cls in CLASSES.items():
        md5s = make_archives(folder, 3, NUMBER.get(name, 4), [name])
        kept, cls.archives = cls.archives, use_hashes(cls, md5s[name])
        try:
            cls.fetch(folder / name, download=False)
        finally:
            cls.archives = kept
        for archive in cls.archives:
            (folder / name / archive.file).unlink(missing_ok=True)
    return {name: folder / name for name in CLASSES}


def content(dataset: Benchmark) -> list[tuple[str, str, str, int]]:
    """Name, class, split and bytes of each image."""
    return [(i.name, i.class_name, i.split, i.source.crc(i.name)) for i in dataset.everything]


def move(root: Path, *moves: tuple[str, str]) -> None:
    for source, target in moves:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).rename(root / ".moving")
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / ".moving").rename(root / target)


def unsplit_artbench(root: Path) -> list[dict[str, str]]:
    """Make the imagefolder without a split; rows of its table."""
    rows = []
    for path in sorted(root.glob("artbench-10-imagefolder-split/*/*/*.jpg")):
        row = {"name": path.name, "artist": "painter", "label": path.parent.name, "split": path.parents[1].name}
        rows.append(row)
        put(root / "artbench-10-imagefolder" / row["label"] / path.name, path.read_bytes())
    shutil.rmtree(root / "artbench-10-imagefolder-split")
    return rows


def artbench_with_table(root: Path) -> None:
    rows = unsplit_artbench(root)
    with (root / "ArtBench-10.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def cars_of_kaggle(root: Path) -> None:
    move(
        root,
        ("stanford_cars/cars_train", "cars_train/cars_train"),
        ("stanford_cars/cars_test", "cars_test/cars_test"),
        ("stanford_cars/devkit", "car_devkit/devkit"),
        ("stanford_cars/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat"),
    )
    shutil.rmtree(root / "stanford_cars")


def without_class_names(root: Path) -> None:
    (root / "SUN397" / "ClassName.txt").unlink()


FUNGI = [(f"DF20M-{kind}_metadata_PROD.csv", kind) for kind in ("train", "public_test")]
# (dataset, what is done to its official layout, what data.root is below it)
DEEPER: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "CUB twice": ("cub", lambda r: move(r, ("CUB_200_2011", "CUB_200_2011/CUB_200_2011")), ""),
    "CUB in a folder": ("cub", lambda r: move(r, ("CUB_200_2011", "archive/CUB_200_2011")), ""),
    "Food twice": ("food101", lambda r: move(r, ("food-101", "food-101/food-101")), ""),
    "Food of kmader": (
        *("food101", lambda r: move(r, ("food-101/images", "images"), ("food-101/meta", "meta/meta"))),
        "",
    ),
    "SUN without ClassName.txt": ("sun397", without_class_names, ""),
    "SUN twice without ClassName.txt": (
        *("sun397", lambda r: (without_class_names(r), move(r, ("SUN397", "SUN397/SUN397")))),
        "",
    ),
    "fungi in two folders": (
        "df20m_mini",
        lambda r: move(r, ("DF20M", "DF20M-images/DF20M"), *((f, f"DF20M-metadata/{f}") for f, _ in FUNGI)),
        "",
    ),
    "fungi with tables at the top": ("df20m_mini", lambda r: move(r, ("DF20M", "DF20M-images/DF20M")), ""),
    "fungi in one folder": (
        "df20m_mini",
        lambda r: move(r, ("DF20M", "DF20M-images/DF20M"), *((f, f"DF20M-images/{f}") for f, _ in FUNGI)),
        "",
    ),
    "Caltech's classes": ("caltech101", lambda r: move(r, ("caltech101/101_ObjectCategories", "caltech-101")), ""),
    "Caltech's folder itself": ("caltech101", lambda r: None, "caltech101/101_ObjectCategories"),
    "Caltech in a folder": ("caltech101", lambda r: move(r, ("caltech101", "archive/caltech-101")), ""),
    "ArtBench twice": (
        "artbench10",
        lambda r: move(r, *[("artbench-10-imagefolder-split", "/".join(["artbench-10-imagefolder-split"] * 2))]),
        "",
    ),
    "ArtBench with a table": ("artbench10", artbench_with_table, ""),
    "flowers twice": ("flowers102", lambda r: move(r, ("flowers-102", "archive/flowers-102")), ""),
    "cars of Kaggle with the kit": ("stanford_cars", cars_of_kaggle, ""),
}


@pytest.mark.parametrize("case", DEEPER)
def test_deeper_folders_are_the_same_dataset(official, tmp_path, case):
    name, change, below = DEEPER[case]
    root = tmp_path / name
    shutil.copytree(official[name], root)
    expected = CLASSES[name](official[name], 16)
    change(root)
    put(root / "__MACOSX" / "images" / "._x.jpg", b"a fork")
    root = root / below
    assert CLASSES[name].is_complete(root)
    CLASSES[name].fetch(root, download=False)  # no archive is asked for, and no checksum compared
    found = CLASSES[name](root, 16)
    assert found.class_names == expected.class_names
    assert content(found) == content(expected)
    assert found.fingerprint == expected.fingerprint
    assert found.load().shape[1:] == (3, 16, 16)


def test_the_archives_leave_only_the_dataset(official):
    assert not [path for root in official.values() for path in root.rglob("*") if "__MACOSX" in path.parts]
    assert all(cls(official[name], 16).num_classes == NUMBER.get(name, 4) for name, cls in CLASSES.items())


# Partitions of SUN397


def test_partitions_are_chosen_by_a_key(official, tmp_path):
    root = tmp_path / "sun397"
    shutil.copytree(official["sun397"], root)
    whole = SUN397(root, 16, split=None)
    names = whole.names
    with pytest.raises(UserError, match=r"needs Training_03\.txt in .*Partitions"):
        SUN397(root, 16, partition=3)
    put(root / "Partitions" / "Training_03.txt", "".join(f"/{name}\n" for name in names[:5]))
    put(root / "Partitions" / "Testing_03.txt", "".join(f"/{name}\r\n" for name in names[6:9]))
    train, test = (SUN397(root, 16, split, partition=3) for split in ("train", "test"))
    assert (train.names, test.names) == (names[:5], names[6:9])
    assert train.labels.tolist() == whole.labels[:5].tolist()
    assert any("published are 19,850" in sentence for sentence in train.incomplete)
    assert content(SUN397(root, 16)) == content(whole)  # no key, no change
    with pytest.raises(UserError, match="partition is 11"):
        SUN397(root, 16, partition=11)
    put(root / "Partitions" / "Testing_03.txt", "/a/abbey/gone.jpg\n")
    with pytest.raises(UserError, match=r"names 1 images that are not in .*a/abbey/gone\.jpg"):
        SUN397(root, 16, partition=3)


# Copies


def write_folders(root: Path, classes: list[str], splits: tuple[str, ...]) -> Path:
    for split in splits:
        for i, name in enumerate(classes):
            put(root / split / name / f"{split}{i}.png", png((i % 256, len(split), 0)))
    return root


def write_parquet(root: Path, classes: list[str], splits: tuple[str, ...], named: bool = True) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow, which only Parquet files need, is not installed")
    pq = pytest.importorskip("pyarrow.parquet")
    for split in splits:
        images = [{"bytes": png((i % 256, len(split), 0)), "path": f"{i}.png"} for i in range(len(classes))]
        table = pa.table({"image": pa.array(images), "label": pa.array(list(range(len(classes))))})
        if named:
            features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (root / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def every(name: str) -> list[str]:
    return class_names(name, CLASSES[name].published["classes"])


def birds() -> list[str]:
    return [f"{i:03d}.{name.replace(' ', '_')}" for i, name in enumerate(every("cub"), start=1)]


NUMBERS = [str(i) for i in range(1, 103)]
COPIES: dict[str, tuple[str, Callable[[Path], Path], dict[str, int]]] = {
    "Food, Parquet": (
        *("food101", lambda r: write_parquet(r, every("food101"), ("train", "validation"))),
        {"train": 101, "test": 101},
    ),
    "Food, folders": (
        *("food101", lambda r: write_folders(r / "food", every("food101"), ("train", "test"))),
        {"train": 101, "test": 101},
    ),
    "flowers, Parquet with names": (
        *("flowers102", lambda r: write_parquet(r, sorted(every("flowers102")), ("train", "validation", "test"))),
        {"train": 102, "val": 102, "test": 102},
    ),
    "flowers, Parquet with numbers": (
        *("flowers102", lambda r: write_parquet(r, NUMBERS, ("train", "test"), named=False)),
        {"train": 102, "test": 102},
    ),
    "flowers of Kaggle": (
        *("flowers102", lambda r: write_folders(r / "dataset", NUMBERS, ("train", "valid", "test"))),
        {"train": 102, "val": 102, "test": 102},
    ),
    "CUB, folders": ("cub", lambda r: write_folders(r, birds(), ("train", "test")), {"train": 200, "test": 200}),
    "CUB, Parquet": ("cub", lambda r: write_parquet(r, birds(), ("train", "test")), {"train": 200, "test": 200}),
    "cars, folders": (
        "stanford_cars",
        lambda r: write_folders(r / "car_data/car_data", every("stanford_cars"), ("train", "test")),
        {"train": 196, "test": 196},
    ),
    "ArtBench, Parquet": (
        "artbench10",
        lambda r: write_parquet(r, [name.replace(" ", "_") for name in every("artbench10")], ("train", "test")),
        {"train": 10, "test": 10},
    ),
    "SUN, Parquet": (
        *("sun397", lambda r: write_parquet(r, [n.replace("/", " ") for n in every("sun397")], ("train", "test"))),
        {"train": 397, "test": 397},
    ),
    "Caltech, Parquet": (
        "caltech101",
        lambda r: write_parquet(r, ["BACKGROUND_Google", *every("caltech101")], ("train",)),
        {"train": 101},  # a hash makes some of them test images, but every class keeps one in training
    ),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_are_read_with_the_classes_of_the_dataset(tmp_path, case):
    name, write, counts = COPIES[case]
    root = write(tmp_path / "copy") and tmp_path / "copy"
    cls = CLASSES[name]
    assert cls.is_complete(root)
    cls.fetch(root, download=False)
    for split, count in counts.items():
        found = cls(root, 16, split)
        assert len(found) == count
        assert found.num_classes == cls.published["classes"]
        assert sorted(found.labels.tolist()) == list(range(found.num_classes))
    expected = every(name)
    if case == "SUN, Parquet":
        expected = [title.replace("/", " ") for title in expected]
    assert found.class_names == expected
    by_class = dict(zip(found.labels.tolist(), found.load()[:, 0, 0, 0].tolist(), strict=True))  # red is the label
    order = {name: i for i, name in enumerate(sorted(expected))} if "with names" in case else None
    shift = 1 if name == "caltech101" else 0
    assert all(red == ((order[expected[k]] if order else k) + shift) % 256 for k, red in by_class.items())
    assert any("is read from" in note for note in found.notes)
    assert found.incomplete


def test_another_order_of_classes_is_said(tmp_path):
    write_parquet(tmp_path, sorted(every("cub"), reverse=True), ("train", "test"))
    assert any("in another order" in note for note in CUB(tmp_path, 16).notes)


# Refused


def birds_without_tables(root: Path) -> None:
    shutil.copytree(root / "CUB_200_2011" / "images", root / "images")
    shutil.rmtree(root / "CUB_200_2011")


def cars_without_kit(root: Path) -> None:
    cars_of_kaggle(root)
    shutil.rmtree(root / "car_devkit")
    (root / "cars_test_annos_withlabels.mat").unlink()


def cars_with_the_other_table(root: Path) -> None:
    cars_without_kit(root)
    whole = root / "whole"
    whole.mkdir()
    stanford_cars_whole(whole)
    (whole / "cars_annos.mat").rename(root / "cars_annos.mat")
    shutil.rmtree(whole)


def small_artbench(root: Path) -> None:
    shutil.rmtree(root / "artbench-10-imagefolder-split")
    put(root / "artbench-10-binary" / "artbench-10-batches-bin" / "data_batch_1.bin", b"\0" * 3073)
    put(root / "ArtBench-10.csv", "name,label,split\n")


def birds_without_images(root: Path) -> None:
    shutil.rmtree(root / "CUB_200_2011" / "images")


def birds_with_other_images(root: Path) -> None:
    birds_without_images(root)
    put(root / "CUB_200_2011" / "images" / "x.jpg", b"")


REFUSED = {
    "cars without labels": (
        "stanford_cars",
        cars_without_kit,
        r"The images in .*cars_train need car_devkit\.tgz and cars_test_annos",
    ),
    "cars with the labels of others": (
        *("stanford_cars", cars_with_the_other_table),
        r"labels the images of car_ims/, which is not there.*numbered differently.*car_devkit\.tgz",
    ),
    "ArtBench without a split": ("artbench10", unsplit_artbench, r"need ArtBench-10\.csv beside them"),
    "ArtBench at 32 pixels": ("artbench10", small_artbench, r"data_batch_1\.bin\) are images of 32 x 32 pixels"),
    "CUB without tables": ("cub", birds_without_tables, r"there is no .*images\.txt, but attributes\.txt, images/"),
    "CUB without images": ("cub", birds_without_images, "there is no images/ with their images"),
    "CUB with other images": ("cub", birds_with_other_images, "not the images that they name, such as images/001"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_at_once(official, tmp_path, case):
    name, change, message = REFUSED[case]
    root = tmp_path / name
    shutil.copytree(official[name], root)
    change(root)
    with pytest.raises(UserError, match=message):
        CLASSES[name](root, 16)


def test_copies_of_something_else_are_refused(tmp_path):
    write_parquet(tmp_path / "digits", [str(i) for i in range(10)], ("train", "test"))
    with pytest.raises(UserError, match="does not hold Food-101: it has 10 classes from '0' to '9', and published are"):
        Food101(tmp_path / "digits", 16)
    write_parquet(tmp_path / "art", [f"style {i}" for i in range(10)], ("train", "test"))
    with pytest.raises(UserError, match="does not hold ArtBench-10"):
        ArtBench10(tmp_path / "art", 16)
    write_parquet(tmp_path / "unsplit", every("food101"), ("train",))
    with pytest.raises(UserError, match="has one split, and published are train and test"):
        Food101(tmp_path / "unsplit", 16)
    write_folders(tmp_path / "folders", [f"car {i}" for i in range(196)], ("train", "test"))
    with pytest.raises(UserError, match="does not hold Stanford Cars"):
        StanfordCars(tmp_path / "folders", 16)
    write_folders(tmp_path / "sets" / "another", ["cat", "accordion"], ("train",))
    with pytest.raises(UserError, match="Caltech-101 is not in"):
        Caltech101(tmp_path / "sets", 16)


def test_files_where_folders_are_expected_are_refused(tmp_path):
    put(tmp_path / "CUB_200_2011.tgz", b"\x1f\x8b")
    with pytest.raises(UserError, match=r"data.root is the file .* Give the folder that holds it"):
        CUB(tmp_path / "CUB_200_2011.tgz", 16)
    with pytest.raises(UserError, match=r"is a tar archive.*Unpack it"):
        ImageDataset(tmp_path / "CUB_200_2011.tgz", 16)


def test_the_known_classes_end_as_they_are_said_to():
    for name in ("flowers102", "artbench10"):
        facts: Facts = CLASSES[name].facts()
        assert (facts.known[0], facts.known[-1], len(facts.known)) == (*facts.ends, facts.count)
    assert Flowers102.facts().splits == ("train", "val", "test")
    assert SUN397.facts().splits == ()
