"""A handful of pictures of each public data set, in the exact layout that its archives unpack to."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

KINDS = ("RGB", "L", "CMYK", "RGB", "turned")  # what real data sets have, in turns


def picture(i: int, size: tuple[int, int] = (40, 36), form: str = "JPEG") -> bytes:
    """A picture of noise: RGB, grayscale, CMYK, or with an EXIF tag that turns it."""
    kind = KINDS[i % len(KINDS)]
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6  # orientation: a quarter
    elif kind != "RGB":
        image = image.convert(kind)
    buffer = BytesIO()
    image.save(buffer, form, exif=exif)
    return buffer.getvalue()


def put(path: Path, content: bytes | str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def cub(root: Path) -> None:
    top = root / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    names = [f"{c}/{c[4:]}_{i:04d}_{796000 + i}.jpg" for c in classes for i in range(1, 6)]
    for i, name in enumerate(names):
        put(top / "images" / name, picture(i))
    rows = list(enumerate(names, start=1))
    put(top / "images.txt", "".join(f"{i} {name}\n" for i, name in rows))
    put(top / "classes.txt", "".join(f"{i} {name}\n" for i, name in enumerate(classes, start=1)))
    put(top / "image_class_labels.txt", "".join(f"{i} {int(name[:3])}\n" for i, name in rows))
    put(top / "train_test_split.txt", "".join(f"{i} {int(i % 5 != 0)}\n" for i, _ in rows))
    put(top / "bounding_boxes.txt", "".join(f"{i} 1.0 1.0 30.0 30.0\n" for i, _ in rows))
    put(top / "parts" / "parts.txt", "1 back\n")
    put(top / "attributes" / "image_attribute_labels.txt", "1 1 0 3 27.7\n")
    put(top / "README", "The Caltech-UCSD Birds-200-2011 Dataset\n")
    put(root / "attributes.txt", "1 has_bill_shape::curved_(up_or_down)\n")


def food101(root: Path) -> None:
    top = root / "food-101"
    classes = ["apple_pie", "baby_back_ribs", "baklava"]
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for c, name in enumerate(classes):
        for i in range(4):
            put(top / "images" / name / f"{1000 * c + i}.jpg", picture(4 * c + i))
        lists["train"][name] = [f"{name}/{1000 * c + i}" for i in range(3)]
        lists["test"][name] = [f"{name}/{1000 * c + 3}"]
    for split, names in lists.items():
        put(top / "meta" / f"{split}.json", json.dumps(names))
        put(top / "meta" / f"{split}.txt", "\n".join(n for found in names.values() for n in found) + "\n")
    put(top / "meta" / "classes.txt", "\n".join(classes) + "\n")
    put(top / "meta" / "labels.txt", "Apple pie\nBaby back ribs\nBaklava\n")
    put(top / "README.txt", "Food-101\n")
    put(top / "license_agreement.txt", "Foodspotting\n")


def sun397(root: Path) -> None:
    top = root / "SUN397"
    classes = ["/a/abbey", "/a/apartment_building/outdoor", "/b/barn"]
    for c, name in enumerate(classes):
        for i in range(8):
            put(top / name[1:] / f"sun_a{c}{i}.jpg", picture(8 * c + i))
    put(top / "ClassName.txt", "\n".join(classes) + "\n")
    put(top / "README.txt", "SUN397\n")


def df20m_mini(root: Path) -> None:
    species = {0: "Amanita muscaria", 1: "Boletus edulis", 2: "Cortinarius sp."}
    number = 0
    for file, count in (("DF20M-train_metadata_PROD.csv", 3), ("DF20M-public_test_metadata_PROD.csv", 1)):
        lines = ["eventDate,genus,image_url,image_path,ImageUniqueID,taxonID,species,scientificName,class_id"]
        for label, name in species.items():
            for _ in range(count):
                path = f"2237{number:06d}-{number}.JPG"
                put(root / "DF20M" / path, picture(number))
                known = "" if label == 2 else name  # some rows have no species
                lines.append(
                    f'2019-01-01,{name.split()[0]},https://x/{path},{path},{number},11.0,{known},"{name}",{label}'
                )
                number += 1
        put(root / file, "\n".join(lines) + "\n")


def caltech101(root: Path) -> None:
    top = root / "caltech101"
    for c, name in enumerate(("BACKGROUND_Google", "Faces", "accordion", "yin_yang")):
        for i in range(1, 9):
            put(top / "101_ObjectCategories" / name / f"image_{i:04d}.jpg", picture(8 * c + i))
    put(top / "101_ObjectCategories" / "BACKGROUND_Google" / "tmp", "not a picture")
    for name in ("Faces_2", "accordion", "yin_yang"):
        path = top / "Annotations" / name / "annotation_0001.mat"
        path.parent.mkdir(parents=True)
        savemat(path, {"box_coord": [1, 2, 3, 4]})


def artbench10(root: Path) -> None:
    top = root / "artbench-10-imagefolder-split"
    for c, style in enumerate(("art_nouveau", "baroque", "ukiyo_e")):
        for split, count in (("train", 3), ("test", 1)):
            for i in range(count):
                put(top / split / style / f"painter_work-{i}-{split}.jpg", picture(5 * c + i, (256, 256)))


def flowers102(root: Path) -> None:
    top = root / "flowers-102"
    for i in range(1, 11):
        put(top / "jpg" / f"image_{i:05d}.jpg", picture(i))
    savemat(top / "imagelabels.mat", {"labels": np.array([[1, 2, 77, 102, 1, 2, 77, 102, 1, 2]], np.uint8)})
    splits = {"trnid": [[9, 2, 3, 4]], "valid": [[5, 6]], "tstid": [[1, 7, 8, 10]]}
    savemat(top / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in splits.items()})


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"]


def annotations(rows: list[dict[str, object]]) -> np.ndarray:
    """Rows as a MATLAB array of structs."""
    return np.array([[tuple(row.values()) for row in rows]], dtype=[(name, object) for name in rows[0]])


def box(**more: object) -> dict[str, object]:
    return {"bbox_x1": 1, "bbox_y1": 1, "bbox_x2": 9, "bbox_y2": 9, **more}


def stanford_cars(root: Path) -> None:
    top = root / "stanford_cars"
    (top / "devkit").mkdir(parents=True)
    savemat(top / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    for split, count, file in (
        ("train", 7, top / "devkit" / "cars_train_annos.mat"),
        ("test", 3, top / "cars_test_annos_withlabels.mat"),
    ):
        rows = [box(**{"class": i % 3 + 1, "fname": f"{i + 1:05d}.jpg"}) for i in range(count)]
        for i, row in enumerate(rows):
            put(top / f"cars_{split}" / str(row["fname"]), picture(i))
        savemat(file, {"annotations": annotations(rows)})
    rows = [box(fname=f"{i + 1:05d}.jpg") for i in range(3)]
    savemat(top / "devkit" / "cars_test_annos.mat", {"annotations": annotations(rows)})


def stanford_cars_whole(root: Path) -> None:
    rows = [
        {"relative_im_path": f"car_ims/{i + 1:06d}.jpg", **box(), "class": i % 3 + 1, "test": int(i % 2)}
        for i in range(6)
    ]
    for i, row in enumerate(rows):
        put(root / str(row["relative_im_path"]), picture(i))
    savemat(root / "cars_annos.mat", {"annotations": annotations(rows), "class_names": np.array([CARS], dtype=object)})


SYNSETS = ["n01440764", "n01443537", "n02102040"]


def imagenet(root: Path) -> None:
    for c, synset in enumerate(SYNSETS):
        for i in range(4):
            put(root / "train" / synset / f"{synset}_{i}.JPEG", picture(4 * c + i))
    for i in range(1, 5):
        put(root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", picture(i))
    data = root / "ILSVRC2012_devkit_t12" / "data"
    put(data / "ILSVRC2012_validation_ground_truth.txt", "3\n1\n2\n3\n")
    synsets = [
        {"ILSVRC2012_ID": i, "WNID": synset, "words": "fish", "gloss": "", "num_children": 0}
        for i, synset in enumerate(reversed(SYNSETS), start=1)  # the kit's order is not the alphabet's
    ]
    savemat(data / "meta.mat", {"synsets": annotations(synsets).T})


def celebahq(root: Path) -> None:
    top = root / "CelebAMask-HQ"
    numbers = [119614, 99095, 200122, 162770, 162771, 182637, 182638, 22]
    rows = [f"{i:<8}{n - 1:<12}{n:06d}.jpg" for i, n in enumerate(numbers)]
    put(top / "CelebA-HQ-to-CelebA-mapping.txt", "\n".join(["idx     orig_idx    orig_file", *rows]) + "\n")
    for i in range(len(numbers)):
        put(top / "CelebA-HQ-img" / f"{i}.jpg", picture(i, (64, 64)))
    put(top / "CelebAMask-HQ-attribute-anno.txt", "8\nSmiling\n")


MINIATURES: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        *(artbench10, caltech101, celebahq, cub, df20m_mini, flowers102, food101, imagenet, stanford_cars, sun397),
    )
}
