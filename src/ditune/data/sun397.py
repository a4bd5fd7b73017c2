"""SUN397 (Xiao et al., CVPR 2010): 397 kinds of scenes.

The authors publish ten partitions of 50 training and 50 test images a class, and no single split of the whole. By
default a tenth of all images, by a hash of the path, is 'test' and the rest 'train', the same on every machine.
"""

from dataclasses import replace
from pathlib import Path

from ditune.data.annotations import images_below, read_lines
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.data.places import find_top, locate
from ditune.data.splits import hashed_split
from ditune.errors import UserError

PARTS = {"train": "Training", "test": "Testing"}
A_CLASS = "a/abbey"  # by which the folder is recognised if ClassName.txt is not there


class SUN397(Benchmark):
    """SUN397; arguments as of every `Benchmark`, and one more.

    Args:
        partition: one of the authors' ten, from Training_01.txt and Testing_01.txt on; images in neither are left out.
            None = all images, split by a hash.
    """

    config = "sun397"
    title = "SUN397"
    homepage = "https://vision.princeton.edu/projects/2010/SUN/"
    licence = "Photographs from the web whose rights are their authors'; the licence is not stated. Research use."
    archives = (Archive("SUN397.tar.gz", makes="SUN397", md5="8ca2778205c41d23104230ba66911c7a"),)
    by_hand = (
        "Princeton's address, http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz, has been dead since 2025: "
        "get SUN397.tar.gz, or the unpacked folder SUN397, from a copy of your institute or a mirror on Kaggle."
    )
    # repository and commit: mteb's tasks SUN397 and SUN397ZeroShot; all images, with a split of its own
    on_hub = "hf://datasets/dpdl-benchmark/sun397@7e6af6a2499ad708618be868e1471eac0aca1168"
    tops = ("SUN397",)
    marker = "ClassName.txt"
    deeper = A_CLASS
    published = {"classes": 397, "all": 108754}
    ends = ("abbey", "youth_hostel")

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        split: str | None = "train",
        manifest: str | Path | None = None,
        in_memory: bool = False,
        limit: int | None = None,
        partition: int | None = None,
    ) -> None:
        self.partition = partition
        if partition is not None:
            if not 1 <= partition <= 10:
                raise UserError(f"partition is {partition}. Give 1 to 10, or leave it out for a split by a hash.")
            self.published = {"classes": 397, "train": 397 * 50, "test": 397 * 50}
        super().__init__(root, resolution, split, manifest, in_memory, limit)

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """The folder of the folders a/ to y/; None when the dataset is not there."""
        return super().find(root) or find_top(root, cls.tops, A_CLASS)

    def annotations(self, top: Path) -> tuple[list[str], list[Record]]:
        """All images, or those of the partition."""
        classes, records = self.read(top)
        if self.partition is None:
            return classes, records
        splits = self._partition(top)
        absent = sorted(splits.keys() - {record.name for record in records})
        if absent:
            raise UserError(
                f"Partition {self.partition} names {len(absent):,} images that are not in {top}, such as {absent[0]}. "
                "Unpack the archive again, or leave data.pictures.partition out."
            )
        return classes, [replace(r, split=splits[r.name]) for r in records if r.name in splits]

    def _partition(self, top: Path) -> dict[str, str]:
        """Split of each image of the partition; lines are /a/abbey/sun_aaa.jpg."""
        splits: dict[str, str] = {}
        for split, word in PARTS.items():
            name = f"{word}_{self.partition:02d}.txt"
            path = locate(name, top, self.root)
            if path is None:
                raise UserError(
                    f"data.pictures.partition={self.partition} needs {name} in {top / 'Partitions'}, from "
                    f"Partitions.zip of {self.homepage}. Put it there, or leave the key out for a split by a hash."
                )
            splits |= {line.lstrip("/"): split for line in read_lines(path)}
        return splits

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        folders = {name: "/".join(name.split("/")[1:-1]) for name in images_below(top)}
        if (top / cls.marker).exists():
            classes = [line[3:] for line in read_lines(top / cls.marker)]  # /a/apartment_building/outdoor
        else:
            classes = sorted(set(folders.values()) - {""})  # the order that ClassName.txt has
        index = {name: label for label, name in enumerate(classes)}
        records = []
        for name, folder in folders.items():  # a/apartment_building/outdoor/sun_aaa.jpg
            if folder not in index:
                raise UserError(f"{top / name} lies in the class '{folder}', not named in ClassName.txt. Move it.")
            records.append(Record(name, index[folder], hashed_split(name)))
        return classes, records
