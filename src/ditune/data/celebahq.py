"""CelebA-HQ (Karras et al., arXiv 1710.10196) as CelebAMask-HQ (Lee et al., arXiv 1907.11922) has it: faces, one class.

The split is CelebA's own, by the number of the original file: 1 to 162770 train, to 182637 val, the rest test.
"""

from pathlib import Path

from ditune.data.annotations import number, read_table
from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record

LAST_TRAIN, LAST_VAL = 162770, 182637


class CelebAHQ(Benchmark):
    """CelebA-HQ; arguments as of every `Benchmark`."""

    config = "celebahq"
    title = "CelebA-HQ"
    homepage = "https://github.com/switchablenorms/CelebAMask-HQ"
    licence = "Non-commercial research and education only, says its homepage; images of real people."
    archives = (Archive("CelebAMask-HQ.zip", makes="CelebAMask-HQ"),)
    by_hand = "The homepage links to the archive on Google Drive."
    tops = ("CelebAMask-HQ",)
    marker = "CelebA-HQ-to-CelebA-mapping.txt"
    published = {"train": 24183, "val": 2993, "test": 2824, "classes": 1}

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        records = []
        for i, _, original in read_table(top / cls.marker, 3)[1:]:  # idx orig_idx orig_file
            n = number(original.partition(".")[0], top / cls.marker)
            split = "train" if n <= LAST_TRAIN else "val" if n <= LAST_VAL else "test"
            records.append(Record(f"CelebA-HQ-img/{i}.jpg", 0, split))
        return ["face"], records
