"""Food-101 (Bossard et al., ECCV 2014): 101 dishes."""

import json
from pathlib import Path

from ditune.data.annotations import AGAIN, read_lines
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.errors import UserError


class Food101(Benchmark):
    """Food-101; arguments as of every `Benchmark`."""

    config = "food101"
    title = "Food-101"
    homepage = "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"
    licence = "Photographs from Foodspotting; their terms are in license_agreement.txt of the archive. Research use."
    archives = (
        Archive(
            "food-101.tar.gz",
            makes="food-101",
            urls=("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",),
            md5="85eeb15f3717b99a5da872d97d918f87",
        ),
    )
    tops = ("food-101",)
    marker = "meta/train.json"
    published = {"train": 75750, "test": 25250, "classes": 101}
    ends = ("apple_pie", "waffles")

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        classes = read_lines(top / "meta" / "classes.txt")
        records = []
        for split in ("train", "test"):
            path = top / "meta" / f"{split}.json"
            try:
                lists = json.loads("\n".join(read_lines(path)))  # {class: [class/id, ...]}
                entries = [(name, image) for name, images in lists.items() for image in images]
            except (ValueError, AttributeError, TypeError) as error:
                raise UserError(f"The annotation file {path} is damaged ({error}). {AGAIN}") from error
            unknown = sorted({name for name, _ in entries} - set(classes))
            if unknown:
                raise UserError(f"{path} has the class '{unknown[0]}', which classes.txt has not. {AGAIN}")
            records += [Record(f"images/{image}.jpg", classes.index(name), split) for name, image in entries]
        return classes, records
