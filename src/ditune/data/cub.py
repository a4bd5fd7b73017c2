"""Caltech-UCSD Birds-200-2011 (Wah et al. 2011, CNS-TR-2011-001): 200 species of birds."""

from dataclasses import replace
from pathlib import Path

from ditune.data.annotations import number, read_table
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.data.copies import Facts
from ditune.errors import UserError


class CUB(Benchmark):
    """CUB-200-2011; arguments as of every `Benchmark`."""

    config = "cub"
    title = "CUB-200-2011"
    homepage = "https://www.vision.caltech.edu/datasets/cub_200_2011/"
    licence = "The licence is not stated; photographs from Flickr whose rights are their authors'. Research use."
    archives = (
        Archive(
            "CUB_200_2011.tgz",
            makes="CUB_200_2011",
            urls=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
            md5="97eceeb196236b17998738112f37df78",
        ),
    )
    tops = ("CUB_200_2011",)
    marker = "images.txt"
    deeper = "images/001.Black_footed_Albatross"
    published = {"train": 5994, "test": 5794, "classes": 200}
    ends = ("Black footed Albatross", "Common Yellowthroat")

    @classmethod
    def facts(cls) -> Facts:
        """Folders and labels of copies are called 001.Black_footed_Albatross."""
        return replace(super().facts(), class_name=_class_name)

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        classes = read_table(top / "classes.txt", 2)  # 1 001.Black_footed_Albatross
        paths = dict(read_table(top / "images.txt", 2))
        labels = dict(read_table(top / "image_class_labels.txt", 2))  # 1 .. 200
        splits = dict(read_table(top / "train_test_split.txt", 2))  # 1 = train
        for name, table in (("image_class_labels.txt", labels), ("train_test_split.txt", splits)):
            if table.keys() != paths.keys():
                different = sorted(table.keys() ^ paths.keys())[0]
                raise UserError(f"{top / name} and images.txt differ at image {different}. Unpack the archive again.")
        records = [
            Record(
                f"images/{path}",
                number(labels[i], top / "image_class_labels.txt") - 1,
                "train" if splits[i] == "1" else "test",
            )
            for i, path in paths.items()
        ]
        return [_class_name(name) for _, name in classes], records


def _class_name(name: str) -> str:
    """Black footed Albatross for 001.Black_footed_Albatross."""
    return name.rpartition(".")[2].replace("_", " ")
