"""Caltech-101 (Fei-Fei et al. 2004): 101 kinds of objects; BACKGROUND_Google, which is no kind, is left out.

The class folders may lie in 101_ObjectCategories/, or directly in the top folder.

There is no official split: a tenth of the images, by a hash of the path, is 'test' and the rest 'train'.
"""

from dataclasses import replace
from pathlib import Path

from ditune.data.annotations import images_below
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.data.copies import Facts
from ditune.data.places import find_top, locate
from ditune.data.splits import hashed_split

BACKGROUND = "BACKGROUND_Google"
A_CLASS = "accordion/image_0001.jpg"  # by which folders of classes are recognised


class Caltech101(Benchmark):
    """Caltech-101; arguments as of every `Benchmark`."""

    config = "caltech101"
    title = "Caltech-101"
    homepage = "https://data.caltech.edu/records/mzrjq-6wc02"
    licence = "CC BY 4.0."
    archives = (
        Archive(
            "caltech-101.zip",
            makes="caltech101/101_ObjectCategories",
            urls=("https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",),
            md5="3138e1922a9193bfa496528edbbc45d0",
            into="caltech101",
            inner="101_ObjectCategories.tar.gz",
        ),
    )
    tops = ("caltech101", "caltech-101")
    marker = "101_ObjectCategories"
    published = {"classes": 101, "all": 8677}
    ends = ("Faces", "yin_yang")

    @classmethod
    def facts(cls) -> Facts:
        """Some copies call the background a class."""
        return replace(super().facts(), left_out=(BACKGROUND, "background"))

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """The top folder, or that of the classes; None when the dataset is not there."""
        return super().find(root) or find_top(root, (), A_CLASS)

    @classmethod
    def place(cls, first: str, top: Path, root: Path) -> Path | None:
        """The folder of the classes."""
        return top if (top / A_CLASS).exists() else locate(first, top, root)

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        folder = cls.place(cls.marker, top, top) or top / cls.marker
        names = [name for name in images_below(folder) if not name.startswith(f"{BACKGROUND}/")]
        classes = sorted({name.partition("/")[0] for name in names})
        index = {name: label for label, name in enumerate(classes)}
        return classes, [
            Record(f"{cls.marker}/{name}", index[name.partition("/")[0]], hashed_split(name)) for name in names
        ]
