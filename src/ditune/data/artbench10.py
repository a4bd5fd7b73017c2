"""ArtBench-10 (Liao et al., arXiv 2206.11404): paintings of ten styles, 256 x 256."""

from pathlib import Path

from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record, images_below
from ditune.errors import UserError


class ArtBench10(Benchmark):
    """ArtBench-10; arguments as of every `Benchmark`."""

    config = "artbench10"
    title = "ArtBench-10"
    homepage = "https://github.com/liaopeiyuan/artbench"
    licence = "Its authors declare fair use of the images, for research; their code is MIT."
    archives = (
        Archive(
            "artbench-10-imagefolder-split.tar",
            makes="artbench-10-imagefolder-split",
            urls=("https://artbench.eecs.berkeley.edu/files/artbench-10-imagefolder-split.tar",),
        ),
    )
    by_hand = "A mirror: https://www.kaggle.com/datasets/alexanderliao/artbench10."
    tops = ("artbench-10-imagefolder-split",)
    marker = "train"
    published = {"train": 50000, "test": 10000, "classes": 10}

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        names = {split: images_below(top / split) for split in ("train", "test")}
        classes = sorted({name.partition("/")[0] for name in names["train"]})
        unknown = {name.partition("/")[0] for name in names["test"]} - set(classes)
        if unknown or not names["test"]:
            what = f"the style '{min(unknown)}', which train/ has not" if unknown else "no images"
            raise UserError(f"{top / 'test'} has {what}. Unpack the archive again.")
        index = {name: label for label, name in enumerate(classes)}
        return [name.replace("_", " ") for name in classes], [
            Record(f"{split}/{name}", index[name.partition("/")[0]], split)
            for split, found in names.items()
            for name in found
        ]
