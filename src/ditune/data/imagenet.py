"""ImageNet-1k, ILSVRC 2012 (Russakovsky et al., arXiv 1409.0575): 1000 synsets, sorted, as in DiT's label table."""

from pathlib import Path

from ditune.data.annotations import AGAIN, images_below, number, read_lines, read_mat
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12"


class ImageNet(Benchmark):
    """Images in train/<synset>/*.JPEG, and in val/<synset>/*.JPEG or val/*.JPEG with the development kit."""

    config = "imagenet"
    title = "ImageNet-1k (ILSVRC 2012)"
    homepage = "https://image-net.org/challenges/LSVRC/2012/"
    licence = "ImageNet's terms of access, which every user accepts there: non-commercial research and education."
    archives = (
        Archive("ILSVRC2012_devkit_t12.tar.gz", makes=DEVKIT, md5="fa75699e90414af021442c21a62c3abf", needed=False),
        Archive(
            "ILSVRC2012_img_train.tar",
            makes="train",
            md5="1d675b47d978889d74fa0da5fadfb00e",
            into="train",
            inner=".tar",
        ),
        Archive("ILSVRC2012_img_val.tar", makes="val", md5="29b22e2961454d5413ddabcf34fc5622", into="val"),
    )
    by_hand = "The files are behind a login at https://image-net.org/download-images."
    tops = ("",)
    marker = "train"
    deeper = "train/n01440764"
    published = {"train": 1281167, "val": 50000, "classes": 1000}

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        train = images_below(top / "train")
        synsets = sorted({name.partition("/")[0] for name in train})
        index = {synset: label for label, synset in enumerate(synsets)}
        records = [Record(f"train/{name}", index[name.partition("/")[0]], "train") for name in train]
        for name, synset in cls._validation(top).items():
            if synset not in index:
                raise UserError(f"{top / 'val' / name} is of the synset '{synset}', which train/ has not. {AGAIN}")
            records.append(Record(f"val/{name}", index[synset], "val"))
        return synsets, records

    @classmethod
    def _validation(cls, top: Path) -> dict[str, str]:
        """Synset of each validation image."""
        names = images_below(top / "val")
        if all("/" in name for name in names):
            return {name: name.partition("/")[0] for name in names}
        data = top / DEVKIT / "data"
        truth = [number(line, data) for line in read_lines(data / "ILSVRC2012_validation_ground_truth.txt")]
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in read_mat(data / "meta.mat", "synsets")}
        if len(truth) != len(names):
            raise UserError(f"{top / 'val'} has {len(names):,} images, the development kit {len(truth):,}. {AGAIN}")
        return {name: synsets[i] for name, i in zip(names, truth, strict=True)}
