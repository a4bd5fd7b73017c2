"""SUN397 (Xiao et al., CVPR 2010): 397 kinds of scenes.

The authors publish ten partitions of 50 training and 50 test images a class, and no single split of the whole. Here
a tenth of all images, by a hash of the path, is 'test' and the rest 'train', the same on every machine.
"""

from pathlib import Path

from ditune.data.archives import Archive
from ditune.data.benchmark import Benchmark, Record, images_below, read_lines
from ditune.data.splits import hashed_split
from ditune.errors import UserError


class SUN397(Benchmark):
    """SUN397; arguments as of every `Benchmark`."""

    config = "sun397"
    title = "SUN397"
    homepage = "https://vision.princeton.edu/projects/2010/SUN/"
    licence = "Photographs from the web whose rights are their authors'; the licence is not stated. Research use."
    archives = (Archive("SUN397.tar.gz", makes="SUN397", md5="8ca2778205c41d23104230ba66911c7a"),)
    by_hand = (
        "Princeton's address, http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz, has been dead since 2025: "
        "get SUN397.tar.gz, or the unpacked folder SUN397, from a copy of your institute or a mirror on Kaggle."
    )
    tops = ("SUN397",)
    marker = "ClassName.txt"
    published = {"classes": 397, "all": 108754}

    @classmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Annotations of the official layout; see `Benchmark.read`."""
        classes = [line[3:] for line in read_lines(top / "ClassName.txt")]  # /a/apartment_building/outdoor
        index = {name: label for label, name in enumerate(classes)}
        records = []
        for name in images_below(top):  # a/apartment_building/outdoor/sun_aaa.jpg
            folder = "/".join(name.split("/")[1:-1])
            if folder not in index:
                raise UserError(f"{top / name} lies in the class '{folder}', not named in ClassName.txt. Move it.")
            records.append(Record(name, index[folder], hashed_split(name)))
        return classes, records
