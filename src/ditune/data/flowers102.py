"""Oxford 102 Flowers (Nilsback & Zisserman 2008). The official split trains on the smallest of its three parts."""

from dataclasses import replace
from pathlib import Path

from ditune.data.annotations import AGAIN, read_mat
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.data.copies import Facts
from ditune.errors import UserError

ADDRESS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


class Flowers102(Benchmark):
    """Oxford Flowers-102; arguments as of every `Benchmark`."""

    config = "flowers102"
    title = "Oxford Flowers-102"
    homepage = f"{ADDRESS}/"
    licence = "The licence is not stated; photographs from the web whose rights are their authors'. Research use."
    archives = (
        Archive(
            "102flowers.tgz",
            makes="flowers-102/jpg",
            urls=(f"{ADDRESS}/102flowers.tgz",),
            md5="52808999861908f626f3c1f4e79d11fa",
            into="flowers-102",
        ),
        Archive(
            "imagelabels.mat",
            makes="flowers-102/imagelabels.mat",
            urls=(f"{ADDRESS}/imagelabels.mat",),
            md5="e0620be6f572b9609742df49c70aed4d",
            into="flowers-102",
        ),
        Archive(
            "setid.mat",
            makes="flowers-102/setid.mat",
            urls=(f"{ADDRESS}/setid.mat",),
            md5="a5357ecc9cb78c4bef273ce3793fc85c",
            into="flowers-102",
        ),
    )
    tops = ("flowers-102",)
    marker = "jpg"
    deeper = "jpg/image_00001.jpg"
    published = {"train": 1020, "val": 1020, "test": 6149, "classes": 102}
    ends = ("pink primrose", "blackberry lily")

    @classmethod
    def facts(cls) -> Facts:
        """Folders and labels of copies are names, or numbers as in imagelabels.mat."""
        return replace(super().facts(), known=_names())

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        labels = read_mat(top / "imagelabels.mat", "labels").astype(int) - 1  # 1 .. 102 in the file
        records = []
        for split, key in SPLITS.items():
            for i in read_mat(top / "setid.mat", key).astype(int).tolist():  # 1-based
                if not 1 <= i <= len(labels):
                    raise UserError(f"{top / 'setid.mat'} names image {i}, which has no label. {AGAIN}")
                records.append(Record(f"jpg/image_{i:05d}.jpg", int(labels[i - 1]), split))
        return list(_names()), records


def _names() -> tuple[str, ...]:
    """Names of the classes; the authors' files have numbers only."""
    from torchvision.datasets import Flowers102 as Torchvision  # the import takes seconds

    return tuple(Torchvision.classes)
