"""Danish Fungi 2020 - Mini, DF20M (Picek et al., WACV 2022): 182 species of six genera of fungi."""

import logging
from functools import cache
from pathlib import Path

from ditune.data.annotations import AGAIN, number, read_csv
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record
from ditune.errors import UserError

log = logging.getLogger(__name__)

ADDRESS = "http://ptak.felk.cvut.cz/plants/DanishFungiDataset"
FILES = {"train": "DF20M-train_metadata_PROD.csv", "test": "DF20M-public_test_metadata_PROD.csv"}


class DF20MMini(Benchmark):
    """Danish Fungi 2020 - Mini; arguments as of every `Benchmark`."""

    config = "df20m_mini"
    title = "Danish Fungi 2020 - Mini"
    homepage = "https://sites.google.com/view/danish-fungi-dataset"
    licence = "Non-commercial research only, says its homepage."
    archives = (
        Archive("DF20M-images.tar.gz", makes="DF20M", urls=(f"{ADDRESS}/DF20M-images.tar.gz",)),
        Archive("DF20M-metadata.zip", makes=FILES["train"], urls=(f"{ADDRESS}/DF20M-metadata.zip",)),
    )
    tops = ("",)
    marker = FILES["train"]
    published = {"train": 32753, "test": 3640, "classes": 182}

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        names: dict[int, str] = {}
        rows, spellings = [], []
        for split, file in FILES.items():
            # `species` is empty in some rows; class_id and scientificName are in all of them
            for row in read_csv(top / file, ("image_path", "class_id", "scientificName")):
                label = number(row["class_id"].removesuffix(".0"), top / file)
                name = names.setdefault(label, row["scientificName"])
                if _species(name) != _species(row["scientificName"]):
                    raise UserError(
                        f"{top / file} calls class {label} both '{name}' and '{row['scientificName']}'. {AGAIN}"
                    )
                spellings += [(row["scientificName"], name)] * (name != row["scientificName"])
                rows.append((row["image_path"], label, split))
        if spellings:
            _warn(
                f"{len(spellings):,} rows in {top} name a species with another author than the first row of its class "
                f"('{spellings[0][0]}', '{spellings[0][1]}'). The first name is used."
            )
        order = sorted(names)  # 0 .. 181; a subset of the classes keeps their order
        index = {label: i for i, label in enumerate(order)}
        if order and order[0] < 0:
            raise UserError(f"{top / FILES['train']} has the class_id {order[0]}. {AGAIN}")
        return [names[label] for label in order], [Record(f"DF20M/{p}", index[k], split) for p, k, split in rows]


def _species(name: str) -> list[str]:
    """Genus and species, without the author."""
    return name.lower().split()[:2]


@cache
def _warn(sentence: str) -> None:
    """Once, however many datasets read the files."""
    log.warning("%s", sentence)
