"""Stanford Cars (Krause et al. 2013): 196 models of cars, in one of its two published layouts.

cars_train/ cars_test/ devkit/ cars_test_annos_withlabels.mat     (the challenge's)
car_ims/ cars_annos.mat                                           (the whole, with a test flag)

The two number their images differently, so cars_annos.mat says nothing about those in cars_train/ and cars_test/.
"""

from pathlib import Path

from ditune.data.annotations import read_mat
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.data.places import find_top, locate

WHOLE = "cars_annos.mat"
LABELLED = "cars_test_annos_withlabels.mat"


class StanfordCars(Benchmark):
    """Stanford Cars; arguments as of every `Benchmark`."""

    config = "stanford_cars"
    title = "Stanford Cars"
    homepage = "https://github.com/pytorch/vision/issues/7545"
    licence = "The licence is not stated; photographs from the web whose rights are their authors'. Research use."
    archives = (
        Archive("car_devkit.tgz", makes="stanford_cars/devkit", into="stanford_cars"),
        Archive("cars_train.tgz", makes="stanford_cars/cars_train", into="stanford_cars"),
        Archive("cars_test.tgz", makes="stanford_cars/cars_test", into="stanford_cars"),
        Archive(
            "cars_test_annos_withlabels.mat",
            makes="stanford_cars/cars_test_annos_withlabels.mat",
            into="stanford_cars",
        ),
    )
    by_hand = (
        "Stanford's address has been dead since 2023. Mirrors: "
        "https://www.kaggle.com/datasets/rickyyyyyyy/torchvision-stanford-cars has this layout; car_ims/ with "
        "cars_annos.mat is read too, and so are folders of classes, as in "
        "https://www.kaggle.com/datasets/cyizhuo/stanford-cars-by-classes-folder."
    )
    # repository and commit: the same in several public repositories that pin them, with 8,144 and 8,041 images
    on_hub = "hf://datasets/tanganke/stanford_cars@9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"
    tops = ("stanford_cars",)
    marker = "devkit/cars_meta.mat"
    published = {"train": 8144, "test": 8041, "classes": 196}
    ends = ("AM General Hummer SUV 2000", "smart fortwo Convertible 2012")

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """The top folder of either layout; None when the dataset is not there."""
        return super().find(root) or find_top(root, cls.tops, WHOLE)

    @classmethod
    def missing(cls, root: Path) -> str:
        """Sentences that say what to put where."""
        images = locate("cars_train", root, root)
        return super().missing(root) + (
            f" The images in {images} need car_devkit.tgz and {LABELLED} alone." if images else ""
        )

    @classmethod
    def without(cls, first: str, top: Path) -> str:
        """Sentences that say that the images are not there; see `Benchmark.without`."""
        if (top / cls.marker).exists():
            return super().without(first, top)
        return (
            f"{top / WHOLE} labels the images of {first}/, which is not there. It cannot label those of cars_train/ "
            f"and cars_test/, which are numbered differently. Put devkit/ (from car_devkit.tgz) and {LABELLED} into "
            f"{top}, or the folder {first}/. {cls.by_hand}"
        )

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        if not (top / cls.marker).exists():
            return cls._read_whole(top / WHOLE)
        names = [str(name) for name in read_mat(top / "devkit" / "cars_meta.mat", "class_names")]
        places = (top, top / "devkit", top.parent, top.parent / "devkit")  # some unpack each archive into a folder
        annotations = {
            "train": top / "devkit" / "cars_train_annos.mat",
            "test": next((p / LABELLED for p in places if (p / LABELLED).exists()), top / LABELLED),
        }
        return names, [
            Record(f"cars_{split}/{row['fname']}", int(row["class"]) - 1, split)  # classes are 1 .. 196
            for split, path in annotations.items()
            for row in read_mat(path, "annotations")
        ]

    @classmethod
    def _read_whole(cls, path: Path) -> tuple[list[str], list[Record]]:
        names = [str(name) for name in read_mat(path, "class_names")]
        return names, [
            Record(str(row["relative_im_path"]), int(row["class"]) - 1, "test" if row["test"] else "train")
            for row in read_mat(path, "annotations")
        ]
