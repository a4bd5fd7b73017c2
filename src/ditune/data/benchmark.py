"""Base class of the public datasets.

A dataset is a file with one class, which turns its official layout into labelled images.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from ditune.data.annotations import AGAIN
from ditune.data.archives import Archive, install
from ditune.data.copies import COPY, Facts, fetch_copy, find_copy, read_copy
from ditune.data.images import ImageDataset
from ditune.data.places import find_top, listing, locate
from ditune.data.published_archives import needs_of
from ditune.data.sources import Folder, Item
from ditune.errors import UserError
from ditune.files.needs import Addresses, Need

log = logging.getLogger(__name__)

UNITS = {"classes": "classes", "all": "images"}


@dataclass(frozen=True)
class Record:
    """One image as the annotations have it.

    Args:
        name: path below the top folder, with slashes.
        label: 0 .. K-1.
        split: train, val or test.
    """

    name: str
    label: int
    split: str


class Benchmark(ImageDataset):
    """Images of a public dataset in its official layout, also where folders lie deeper, or in a copy (see `copies`).

    An image has the same name wherever it lies, so the order, the splits and the random numbers are the same too.

    A subclass implements `read` and sets these facts (for each file to download, see also `Archive`):

    config     name of its config, configs/data/<config>.yaml, which messages name
    title      its name in messages
    homepage   where its authors describe it
    licence    a sentence or two, shown before the first download
    archives   the files that are published; unpacked, they make the layout below `root`
    by_hand    what to do if no address works; "" = nothing to add
    on_hub     address of a copy in Parquet files on the Hugging Face hub, for where archives have no address; "" = none
    tops       names that its top folder may have below `root`, the usual one first; "" = the root itself
    marker     a path below the top folder by which it is recognised
    deeper     a path that must be there too where its name is another, if other datasets have the marker
    published  published numbers: images of each split or of `all`, and `classes`
    ends       names of the first and the last class, by which copies are recognised; None = copies are not read

    Args:
        root: folder that holds the dataset's top folder, or that folder itself.
        resolution: side of the square images, in pixels.
        split: train, test or val as the dataset has them; None = all.
        manifest: file written by src/prepare.py: broken images are left out, checksums are known without reading.
        in_memory: decode everything at the first access; False = decode what is asked for.
        limit: keep this many, evenly spaced.

    Raises:
        UserError: the files are not there (with what to put where), or annotations are missing or damaged.
    """

    config: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    licence: ClassVar[str]
    archives: ClassVar[tuple[Archive, ...]]
    by_hand: ClassVar[str] = ""
    on_hub: ClassVar[str] = ""
    tops: ClassVar[tuple[str, ...]]
    marker: ClassVar[str]
    deeper: ClassVar[str] = ""
    published: ClassVar[dict[str, int]]
    ends: ClassVar[tuple[str, str] | None] = None

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        split: str | None = "train",
        manifest: str | Path | None = None,
        in_memory: bool = False,
        limit: int | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.top = self.find(self.root)
        notes: list[str] = []
        if self.top is not None:
            class_names, items = self._official(self.top)
        elif (copy := self.find_copy(self.root)) is not None:
            self.top = copy
            class_names, items, notes = read_copy(copy, self.facts())
        else:
            raise UserError(self.missing(self.root))
        self.fill(items, class_names, resolution, split, in_memory, limit, manifest, notes)

    def _official(self, top: Path) -> tuple[list[str], list[Item]]:
        class_names, records = self.annotations(top)
        self.check(class_names, records)
        records = sorted(records, key=lambda record: record.name)
        # the annotations name the files; a walk over them would take minutes
        source = Folder(top, names=[], moved=self._moved(top, records))
        items = [Item(source, r.name, class_names[r.label], r.split, {"file_name": r.name}) for r in records]
        self._refuse_without_images(items)
        return class_names, items

    def annotations(self, top: Path) -> tuple[list[str], list[Record]]:
        """What `read` reads; a dataset with arguments of its own decides here what they choose."""
        return self.read(top)

    def _moved(self, top: Path, records: Sequence[Record]) -> dict[str, Path]:
        """Where the folders of images lie that are not in the top folder."""
        firsts = {record.name.partition("/")[0] for record in records if "/" in record.name}
        places = {first: self.place(first, top, self.root) for first in sorted(firsts)}
        absent = [first for first, place in places.items() if place is None]
        if absent:
            raise UserError(self.without(absent[0], top))
        return {first: place for first, place in places.items() if place is not None and place != top / first}

    def _refuse_without_images(self, items: Sequence[Item]) -> None:
        """Annotations without their images fail here, not in the first step."""
        some = [items[i * (len(items) - 1) // 2] for i in range(3)] if items else []
        if some and all(item.source.size(item.name) < 0 for item in some):
            raise UserError(
                f"{self.title} in {self.top} has annotations, but not the images that they name, such as "
                f"{some[0].name}. It holds {listing(self.root)}. {AGAIN}"
            )

    @classmethod
    def place(cls, first: str, top: Path, root: Path) -> Path | None:
        """Where the folder lies that the names of images begin with; None = nowhere."""
        return locate(first, top, root)

    @classmethod
    def without(cls, first: str, top: Path) -> str:
        """Sentences that say that there are annotations in `top`, but not the folder `first` of their images."""
        return (
            f"{cls.title} in {top} has annotations, but there is no {first}/ with their images. It holds "
            f"{listing(top)}. {AGAIN}"
        )

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """The top folder of the official layout in `root` or two levels below; None when it is not there."""
        return find_top(root, cls.tops, cls.marker, cls.deeper)

    @classmethod
    def facts(cls) -> Facts:
        """What is known of its classes and splits; subclasses add to it. Only where `ends` is set."""
        splits = tuple(name for name in cls.published if name not in UNITS)
        assert cls.ends is not None
        return Facts(cls.title, cls.published["classes"], splits, cls.ends)

    @classmethod
    def find_copy(cls, root: Path) -> Path | None:
        """The folder of Parquet files or classes in `root`; None when there is none."""
        return find_copy(root, cls.facts()) if cls.ends is not None else None

    @classmethod
    @abstractmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Read the annotations.

        Args:
            top: the top folder.

        Returns:
            Class names in the order of their labels, and all images of all splits.

        Raises:
            UserError: an annotation file is missing or damaged.
        """

    @classmethod
    def check(cls, class_names: Sequence[str], records: Sequence[Record]) -> None:
        """Check annotations.

        Raises:
            UserError: a class is named twice, a label is not 0 .. K-1, or a path leads out of the dataset.
        """
        if len(set(class_names)) != len(class_names):
            twice = sorted({name for name in class_names if list(class_names).count(name) > 1})
            raise UserError(f"{cls.title} names the class '{twice[0]}' twice. Fetch its annotations again.")
        for record in records:
            if PurePosixPath(record.name).is_absolute() or ".." in PurePosixPath(record.name).parts:
                raise UserError(f"{cls.title} names the file '{record.name}', which is outside of it. Do not trust it.")
            if not 0 <= record.label < len(class_names):
                raise UserError(
                    f"{cls.title} gives {record.name} the label {record.label}, which is not one of 0 to "
                    f"{len(class_names) - 1}. Fetch its annotations again."
                )

    @classmethod
    def needs(cls, config: Mapping[str, Any], addresses: Addresses) -> list[Need]:
        """The archives that are missing; see `ditune.files.needs`."""
        return needs_of(cls, Path(config["root"]).expanduser(), addresses.get("archives") or ())

    @classmethod
    def fetch(cls, root: Path, download: bool, mirrors: Sequence[str] = ()) -> None:
        """Bring the dataset to `root`, from archives that lie there or from its address; leave what is there.

        Args:
            root: folder for it.
            download: whether archives that are missing may be downloaded.
            mirrors: addresses of folders that hold the archives, instead of the published ones.

        Raises:
            UserError: a file is missing (with what to put where), cannot be fetched, or is damaged.
        """
        if cls.is_complete(root):
            return
        absent = [archive.at(mirrors) for archive in cls.absent(root)]
        fetched = any(archive.find(root) is None and archive.urls for archive in absent)
        if download and (fetched or (cls.on_hub and cls.lost(absent, root))):
            log.warning("%s will be fetched. %s See %s.", cls.title, cls.licence, cls.homepage)
        if cls.on_hub and download and not mirrors and cls.lost(absent, root):
            log.warning("%s has no official address any more; a copy on the hub is fetched", cls.title)
            fetch_copy(cls.on_hub, root / COPY)
        else:
            for archive in absent:
                install(archive, root, download)
        if cls.find(root) is None and (cls.ends is None or cls.find_copy(root) is None):
            raise UserError(cls.missing(root))

    @classmethod
    def lost(cls, absent: Sequence[Archive], root: Path) -> bool:
        """Whether the dataset cannot be read, and needs an archive that lies nowhere and has no address."""
        lacking = (a for a in absent if a.needed and not a.urls and a.find(root) is None)
        return cls.find(root) is None and any(lacking)

    @classmethod
    def is_complete(cls, root: Path) -> bool:
        """Whether everything that the archives make is in `root`; layouts of another name count as complete."""
        found = cls.find(root)
        if found is None:
            return cls.find_copy(root) is not None
        return found != root / cls.tops[0] or not cls.absent(root)

    @classmethod
    def absent(cls, root: Path) -> list[Archive]:
        """The archives whose content is not in `root`."""
        return [archive for archive in cls.archives if not cls._is_there(archive, root)]

    @staticmethod
    def _is_there(archive: Archive, root: Path) -> bool:
        """Whether what an archive makes is there; a folder at the top may lie deeper."""
        return (root / archive.makes).exists() or ("/" not in archive.makes and bool(locate(archive.makes, root, root)))

    @classmethod
    def missing(cls, root: Path) -> str:
        """Sentences that say what to put where, when the dataset is not in `root`."""
        files = [f"{root / a.file}" + (f" (from {a.urls[0]})" if a.urls else "") for a in cls.archives if a.needed]
        top = root / cls.tops[0] / cls.marker
        hand = f" {cls.by_hand}" if cls.by_hand else ""
        hand += f" With download=true it fetches the copy {cls.on_hub}." if cls.on_hub else ""
        if root.is_file():
            return f"data.root is the file {root}. Give the folder that holds it, in which archives are unpacked."
        command = f"python src/prepare.py data={cls.config}"
        return (
            f"{cls.title} is not in {root}: there is no {top}, but {listing(root)}. Put {', '.join(files)} there "
            f"and run `{command}` with data.root={root}, which unpacks and checks it.{hand}"
        )

    @cached_property
    def incomplete(self) -> list[str]:
        """Sentences about what differs from the published counts."""
        found = {"classes": len(self.class_names), "all": len(self.everything)}
        for item in self.everything:
            found[item.split] = found.get(item.split, 0) + 1
        return [
            f"{self.title} has {found.get(key, 0):,} {UNITS.get(key, f'images in {key}')}, published are {count:,}"
            for key, count in self.published.items()
            if found.get(key, 0) != count
        ]
