"""Caltech-101 (Fei-Fei et al. 2004): 101 kinds of objects; BACKGROUND_Google, which is no kind, is left out.

There is no official split: a tenth of the images, by a hash of the path, is 'test' and the rest 'train'.
"""

from pathlib import Path

from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record, images_below
from ditune.data.splits import hashed_split

BACKGROUND = "BACKGROUND_Google"


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

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        folder = top / cls.marker
        names = [name for name in images_below(folder) if not name.startswith(f"{BACKGROUND}/")]
        classes = sorted({name.partition("/")[0] for name in names})
        index = {name: label for label, name in enumerate(classes)}
        return classes, [
            Record(f"{cls.marker}/{name}", index[name.partition("/")[0]], hashed_split(name)) for name in names
        ]
