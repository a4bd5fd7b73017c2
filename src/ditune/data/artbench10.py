"""ArtBench-10 (Liao et al., arXiv 2206.11404): paintings of ten styles, 256 x 256.

artbench-10-imagefolder-split/train|test/<style>/     (split)
artbench-10-imagefolder/<style>/, ArtBench-10.csv     (not split; the split is in the columns name, label, split)
"""

from dataclasses import replace
from pathlib import Path

from ditune.data.annotations import images_below, read_csv
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.data.copies import Facts
from ditune.data.places import find_top, locate
from ditune.errors import UserError

STYLES = (
    *("art nouveau", "baroque", "expressionism", "impressionism", "post impressionism", "realism", "renaissance"),
    *("romanticism", "surrealism", "ukiyo e"),
)
TABLE, A_STYLE = "ArtBench-10.csv", "art_nouveau"


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
    deeper = f"train/{A_STYLE}"
    published = {"train": 50000, "test": 10000, "classes": 10}
    ends = (STYLES[0], STYLES[-1])

    @classmethod
    def facts(cls) -> Facts:
        """The styles of the paper."""
        return replace(super().facts(), known=STYLES)

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """The folder of train/ and test/, or that of the table if the folders of styles are near; None = neither."""
        split = super().find(root)
        if split is not None:
            return split
        table = find_top(root, (), TABLE)
        return table if table is not None and locate(A_STYLE, table, root) is not None else None

    @classmethod
    def place(cls, first: str, top: Path, root: Path) -> Path | None:
        """The folder train/ or test/; where there is none, that of all styles."""
        style = locate(A_STYLE, top, root)
        return top / first if (top / first).is_dir() else style and style.parent

    @classmethod
    def missing(cls, root: Path) -> str:
        """Sentences that say what to put where."""
        batch = next((b for b in ("data_batch_1.bin", "data_batch_1") if locate(b, root, root)), None)
        small = f" What is there ({batch}) are images of 32 x 32 pixels, which are not used." if batch else ""
        style = locate(A_STYLE, root, root)
        unsplit = f" The styles in {style.parent} need {TABLE} beside them, which has the split." if style else ""
        return super().missing(root) + small + unsplit

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        if not (top / cls.marker).is_dir():
            return cls._read_table(top / TABLE)
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

    @classmethod
    def _read_table(cls, path: Path) -> tuple[list[str], list[Record]]:
        """The images are called as in the layout with a split."""
        rows = read_csv(path, ("name", "label", "split"))
        classes = sorted({row["label"] for row in rows})
        other = next((row["split"] for row in rows if row["split"] not in ("train", "test")), None)
        if other is not None:
            raise UserError(f"{path} has the split '{other}', where train or test is expected. Fetch it again.")
        index = {name: label for label, name in enumerate(classes)}
        return [name.replace("_", " ") for name in classes], [
            Record(f"{row['split']}/{row['label']}/{row['name']}", index[row["label"]], row["split"]) for row in rows
        ]
