"""Small archives of the eight public datasets, with the names and layouts of the published ones.

They are made from public descriptions of the files. The pictures are noise of a few kilobytes: RGB, gray, CMYK, with an
EXIF tag that turns them, and one PNG that is called .jpg. Names of classes are made up, but for the first and the last.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.io import savemat

from ditune.data import CUB, SUN397, ArtBench10, Benchmark, Caltech101, DF20MMini, Flowers102, Food101, StanfordCars
from miniatures import annotations, box, picture, put
from small_datasets import pack

CLASSES: dict[str, type[Benchmark]] = {
    cls.config: cls for cls in (ArtBench10, CUB, Caltech101, DF20MMini, Flowers102, Food101, StanfordCars, SUN397)
}
FORK = b"\x00\x05\x16\x07"  # how a file of macOS's other half begins


def make_archives(
    folder: Path, images_per_class: int = 2, classes: int | None = None, names: Sequence[str] = tuple(CLASSES)
) -> dict[str, dict[str, str]]:
    """Write the archives of datasets to `folder/<data set>/`, the place of data.root with paths.data_dir=<folder>.

    Args:
        folder: for all of them.
        images_per_class: at least 2; where there is an official split, the last of each class is for the test.
        classes: number of classes of each dataset, at least 3; None = as many as are published.
        names: datasets, by the names of their configs.

    Returns:
        MD5 of each file that was written, by dataset and name of the file.
    """
    for name in names:
        root = folder / name
        root.mkdir(parents=True, exist_ok=True)
        titles = class_names(name, classes or CLASSES[name].published["classes"])
        MAKERS[name](root, titles, images_per_class)
    return {
        name: {a.file: hashlib.md5((folder / name / a.file).read_bytes()).hexdigest() for a in CLASSES[name].archives}
        for name in names
    }


def use_hashes(cls: type[Benchmark], md5s: dict[str, str]) -> tuple:
    """The class's archives with these hashes instead of the published ones, to be put into `cls.archives`."""
    return tuple(replace(archive, md5=archive.md5 and md5s[archive.file]) for archive in cls.archives)


def class_names(name: str, count: int) -> list[str]:
    """Names of classes, in the order of their labels; the first and the last are real ones if there are enough."""
    if CLASSES[name].ends is None:
        return [f"Genus species{i:03d}" for i in range(count)]
    known = CLASSES[name].facts().known
    if known:
        return list(known[:count])
    first, last = CLASSES[name].ends
    more = {"caltech101": ["accordion"], "sun397": ["apartment_building/outdoor"]}.get(name, [])
    made_up = [f"{first}{i:03d}" for i in range(count - 2 - len(more))]
    return [first, *made_up, *more, last]


def pictures(titles: Sequence[str], count: int) -> Iterator[tuple[int, int, bytes]]:
    """Class, number in the class and content of each picture; the second one is a PNG."""
    for label in range(len(titles)):
        for i in range(count):
            number = label * count + i
            yield label, i, picture(number, form="PNG" if number == 1 else "JPEG")


def split_of(i: int, count: int) -> str:
    return "test" if i == count - 1 else "train"


def packed(tree: Path, path: Path) -> None:
    """Pack what is in a folder, and remove it."""
    pack(tree, path)
    shutil.rmtree(tree)


def cub(root: Path, titles: list[str], count: int) -> None:
    tree, top = root / ".tree", root / ".tree" / "CUB_200_2011"
    folders = [f"{label:03d}.{title.replace(' ', '_')}" for label, title in enumerate(titles, start=1)]
    lists = dict.fromkeys(("images", "image_class_labels", "train_test_split", "bounding_boxes"), "")
    for number, (label, i, content) in enumerate(pictures(titles, count), start=1):
        name = f"{folders[label]}/{folders[label][4:]}_{i + 1:04d}_{796000 + number}.jpg"
        put(top / "images" / name, content)
        lists["images"] += f"{number} {name}\n"
        lists["image_class_labels"] += f"{number} {label + 1}\n"
        lists["train_test_split"] += f"{number} {int(split_of(i, count) == 'train')}\n"
        lists["bounding_boxes"] += f"{number} 1.0 1.0 30.0 30.0\n"
    lists["classes"] = "".join(f"{number} {name}\n" for number, name in enumerate(folders, start=1))
    for name, text in lists.items():
        put(top / f"{name}.txt", text)
    put(top / "README", "The Caltech-UCSD Birds-200-2011 Dataset\n")
    put(tree / "attributes.txt", "1 has_bill_shape::curved_(up_or_down)\n")
    packed(tree, root / "CUB_200_2011.tgz")


def food101(root: Path, titles: list[str], count: int) -> None:
    tree, top = root / ".tree", root / ".tree" / "food-101"
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, i, content in pictures(titles, count):
        name = f"{titles[label]}/{1000 * label + i}"
        put(top / "images" / f"{name}.jpg", content)
        lists[split_of(i, count)].setdefault(titles[label], []).append(name)
    for split, found in lists.items():
        put(top / "meta" / f"{split}.json", json.dumps(found))
        put(top / "meta" / f"{split}.txt", "".join(f"{n}\n" for listed in found.values() for n in listed))
    put(top / "meta" / "classes.txt", "".join(f"{title}\n" for title in titles))
    put(top / "meta" / "labels.txt", "".join(f"{title.replace('_', ' ').capitalize()}\n" for title in titles))
    put(top / "license_agreement.txt", "Foodspotting\n")
    packed(tree, root / "food-101.tar.gz")


def sun397(root: Path, titles: list[str], count: int) -> None:
    tree, top = root / ".tree", root / ".tree" / "SUN397"
    for label, i, content in pictures(titles, count):
        put(top / titles[label][0] / titles[label] / f"sun_a{label}x{i}.jpg", content)
    put(top / "ClassName.txt", "".join(f"/{title[0]}/{title}\n" for title in titles))
    put(top / "README.txt", "SUN397\n")
    packed(tree, root / "SUN397.tar.gz")


def df20m_mini(root: Path, titles: list[str], count: int) -> None:
    images, tables = root / ".images", root / ".tables"
    head = "eventDate,genus,image_url,image_path,ImageUniqueID,taxonID,species,scientificName,class_id\n"
    rows = {"train": head, "test": head}
    for label, i, content in pictures(titles, count):
        number = label * count + i
        path = f"2237{number:06d}-{number}.JPG"
        put(images / "DF20M" / path, content)
        species = "" if label == 2 else titles[label]  # some rows have none
        title = f"{titles[label]} (L.) Fr."
        rows[split_of(i, count)] += (
            f'2019-01-01,Genus,https://x/{path},{path},{number},11.0,{species},"{title}",{label}\n'
        )
    for split, file in (("train", "DF20M-train_metadata_PROD.csv"), ("test", "DF20M-public_test_metadata_PROD.csv")):
        put(tables / file, rows[split])
        put(tables / "__MACOSX" / f"._{file}", FORK)
    packed(images, root / "DF20M-images.tar.gz")
    packed(tables, root / "DF20M-metadata.zip")


def caltech101(root: Path, titles: list[str], count: int) -> None:
    tree, top = root / ".tree", root / ".inner"
    for label, i, content in pictures([*titles, "BACKGROUND_Google"], count):
        folder = [*titles, "BACKGROUND_Google"][label]
        put(top / "101_ObjectCategories" / folder / f"image_{i + 1:04d}.jpg", content)
    put(top / "101_ObjectCategories" / "BACKGROUND_Google" / "tmp", "not a picture")
    (tree / "caltech-101").mkdir(parents=True)
    packed(top, tree / "caltech-101" / "101_ObjectCategories.tar.gz")
    put(root / ".inner" / "Annotations" / titles[0] / "annotation_0001.mat", "")
    packed(top, tree / "caltech-101" / "Annotations.tar")
    put(tree / "caltech-101" / "show_annotation.m", "%\n")
    for file in ("101_ObjectCategories.tar.gz", "Annotations.tar"):
        put(tree / "__MACOSX" / "caltech-101" / f"._{file}", FORK)
    packed(tree, root / "caltech-101.zip")


def artbench10(root: Path, titles: list[str], count: int) -> None:
    tree = root / ".tree"
    for label, i, content in pictures(titles, count):
        style, split = titles[label].replace(" ", "_"), split_of(i, count)
        put(tree / "artbench-10-imagefolder-split" / split / style / f"painter_work-{label}-{i}.jpg", content)
    packed(tree, root / "artbench-10-imagefolder-split.tar")


def flowers102(root: Path, titles: list[str], count: int) -> None:
    tree, labels = root / ".tree", []
    ids: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    for number, (label, i, content) in enumerate(pictures(titles, count), start=1):
        put(tree / "jpg" / f"image_{number:05d}.jpg", content)
        labels.append(label + 1)
        ids["tstid" if i == count - 1 else "valid" if i and i == count - 2 else "trnid"].append(number)
    packed(tree, root / "102flowers.tgz")
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(root / "setid.mat", {name: np.array([found], np.uint16) for name, found in ids.items()})


def stanford_cars(root: Path, titles: list[str], count: int) -> None:
    trees = {split: root / f".{split}" for split in ("train", "test")}
    rows: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for label, i, content in pictures(titles, count):
        split = split_of(i, count)
        name = f"{len(rows[split]) + 1:05d}.jpg"
        put(trees[split] / f"cars_{split}" / name, content)
        rows[split].append(box(**{"class": label + 1, "fname": name}))
    kit = root / ".kit" / "devkit"
    kit.mkdir(parents=True)
    savemat(kit / "cars_meta.mat", {"class_names": np.array([titles], dtype=object)})
    savemat(kit / "cars_train_annos.mat", {"annotations": annotations(rows["train"])})
    without = [{key: value for key, value in row.items() if key != "class"} for row in rows["test"]]
    savemat(kit / "cars_test_annos.mat", {"annotations": annotations(without)})
    put(kit / "README.txt", "Cars\n")
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": annotations(rows["test"])})
    packed(root / ".kit", root / "car_devkit.tgz")
    for split, tree in trees.items():
        packed(tree, root / f"cars_{split}.tgz")


MAKERS: dict[str, Callable[[Path, list[str], int], None]] = {
    function.__name__: function
    for function in (artbench10, caltech101, cub, df20m_mini, flowers102, food101, stanford_cars, sun397)
}
