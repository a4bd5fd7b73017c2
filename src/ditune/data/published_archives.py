"""What is known of the datasets' archives before they are fetched: which of them a folder lacks, and their sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ditune.data.copies import COPY
from ditune.files.needs import Need

if TYPE_CHECKING:
    from ditune.data.archives import Archive
    from ditune.data.benchmark import Benchmark

# Bytes of archives, as pinned or logged in several public repositories that fetch them; of DF20M about, as its authors
# write. No size of ArtBench-10 was found.
SIZES = {
    "CUB_200_2011.tgz": 1_150_585_339,
    "food-101.tar.gz": 4_996_278_331,
    "102flowers.tgz": 344_862_509,
    "caltech-101.zip": 137_414_764,
    "DF20M-images.tar.gz": 12_500_000_000,
}


def needs_of(cls: type["Benchmark"], root: Path, mirrors: Sequence[str] = ()) -> list[Need]:
    """What a public dataset lacks in `root`, or one need that is there.

    Args:
        cls: class of the dataset.
        root: folder of its files.
        mirrors: addresses of folders that hold its archives, instead of the published ones.
    """
    what = f"dataset {cls.title}"
    if cls.is_complete(root):
        return [Need(what, root, present=True)]
    absent = [archive.at(mirrors) for archive in cls.absent(root)]
    lacking = [archive for archive in absent if archive.find(root) is None]
    by_hand = [archive for archive in lacking if archive.needed and not archive.urls]
    if cls.on_hub and not mirrors and cls.lost(absent, root):
        return [_copy_need(cls, root)]
    if by_hand and cls.find(root) is None:
        return [Need(what, root, present=False, licence=cls.licence, remedy=cls.missing(root))]
    there = [archive for archive in absent if archive not in lacking]
    return [
        *(Need(f"{what}, {a.file} to be unpacked", root / a.file, present=True) for a in there),
        *(_need(cls, archive, root) for archive in lacking if archive.urls),
    ]


def _copy_need(cls: type["Benchmark"], root: Path) -> Need:
    return Need(
        f"dataset {cls.title}, a copy on the hub",
        root / COPY,
        present=False,
        addresses=(cls.on_hub,),
        licence=cls.licence,
        remedy=cls.missing(root),
        unpacked=0,  # its dataset fetches it, and reads it as it is
    )


def _need(cls: type["Benchmark"], archive: "Archive", root: Path) -> Need:
    size = SIZES.get(archive.file)
    return Need(
        f"dataset {cls.title}, {archive.file}",
        root / archive.file,
        present=False,
        addresses=archive.urls,
        size=size,
        md5=archive.md5,
        licence=cls.licence,
        remedy=cls.missing(root),
        unpacked=size or 0,  # images hardly shrink in an archive
    )
