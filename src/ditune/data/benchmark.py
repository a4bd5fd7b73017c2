"""Base class of the public datasets, and readers of their annotation files.

A dataset is a file with one class, which turns its official layout into labelled images.
"""

import csv
import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from ditune.data.archives import Archive, install
from ditune.data.formats import is_image
from ditune.data.images import BROKEN, ImageDataset
from ditune.data.published_archives import needs_of
from ditune.data.sources import Folder, Item
from ditune.errors import UserError
from ditune.files.needs import Addresses, Need

log = logging.getLogger(__name__)


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
    """Images of a public dataset in its official layout.

    A subclass implements `read` and sets these facts (for each file to download, see also `Archive`):

    config     name of its config, configs/data/<config>.yaml, which messages name
    title      its name in messages
    homepage   where its authors describe it
    licence    a sentence or two, shown before the first download
    archives   the files that are published; unpacked, they make the layout below `root`
    by_hand    what to do if no address works; "" = nothing to add
    tops       names that its top folder may have below `root`, the usual one first; "" = the root itself
    marker     a path below the top folder by which it is recognised
    published  published numbers: images of each split or of `all`, and `classes`

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
    tops: ClassVar[tuple[str, ...]]
    marker: ClassVar[str]
    published: ClassVar[dict[str, int]]

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
        if self.top is None:
            raise UserError(self.missing(self.root))
        class_names, records = self.read(self.top)
        self.check(class_names, records)
        source = Folder(self.top, names=[])  # the annotations name the files; a walk over them would take minutes
        records = sorted(records, key=lambda record: record.name)
        items = [Item(source, r.name, class_names[r.label], r.split, {"file_name": r.name}) for r in records]
        self.fill(items, class_names, resolution, split, in_memory, limit, manifest)

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """The top folder of the dataset below `root`; None when it is not there."""
        return find_top(root, cls.tops, cls.marker)

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
        top = cls.find(root)
        if top is not None and top != root / cls.tops[0]:
            return  # its top folder itself, or another of its layouts
        absent = [archive.at(mirrors) for archive in cls.archives if not (root / archive.makes).exists()]
        if any(archive.find(root) is None and archive.urls for archive in absent) and download:
            log.warning("%s will be fetched. %s See %s.", cls.title, cls.licence, cls.homepage)
        for archive in absent:
            install(archive, root, download)
        if cls.find(root) is None:
            raise UserError(cls.missing(root))

    @classmethod
    def is_complete(cls, root: Path) -> bool:
        """Whether everything that the archives make is in `root`; layouts of another name count as complete."""
        found = cls.find(root)
        if found is None or found != root / cls.tops[0]:
            return found is not None
        return all((root / archive.makes).exists() for archive in cls.archives)

    @classmethod
    def missing(cls, root: Path) -> str:
        """Sentences that say what to put where, when the dataset is not in `root`."""
        files = [f"{root / a.file}" + (f" (from {a.urls[0]})" if a.urls else "") for a in cls.archives if a.needed]
        top = root / cls.tops[0] / cls.marker
        hand = f" {cls.by_hand}" if cls.by_hand else ""
        command = f"python src/prepare.py data={cls.config}"
        return (
            f"{cls.title} is not in {root}: there is no {top}. Put {', '.join(files)} there and run "
            f"`{command}` with data.root={root}, which unpacks and checks it.{hand}"
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


def find_top(root: Path, tops: Iterable[str], marker: str) -> Path | None:
    """The first folder that has `marker` in it, among `tops` below `root` and `root` itself; None = there is none."""
    return next((root / top for top in (*tops, "") if (root / top / marker).exists()), None)


def read_lines(path: Path) -> list[str]:
    """Lines of an annotation file that are not empty, stripped.

    Raises:
        UserError: the file is missing or is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"The annotation file {path} is missing. {AGAIN}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The annotation file {path} is damaged ({error}). {AGAIN}") from error
    return [line.strip() for line in lines if line.strip()]


def read_table(path: Path, columns: int) -> list[list[str]]:
    """Rows of an annotation file, split at blanks into `columns` fields; the last field keeps its blanks.

    Raises:
        UserError: the file is missing or damaged, or a row has fewer fields.
    """
    rows = [line.split(maxsplit=columns - 1) for line in read_lines(path)]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise UserError(f"Line {number} of {path} has {len(row)} fields, not {columns}. {AGAIN}")
    return rows


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file as dictionaries; its first line names at least `columns`.

    Raises:
        UserError: the file is missing or damaged, or a column is missing.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows, found = list(reader), reader.fieldnames or []
    except FileNotFoundError as error:
        raise UserError(f"The annotation file {path} is missing. {AGAIN}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The annotation file {path} is damaged ({error}). {AGAIN}") from error
    lacking = [column for column in columns if column not in found]
    if lacking:
        raise UserError(f"{path} has no column '{lacking[0]}'. It has these: {', '.join(found)}. {AGAIN}")
    return rows


def read_mat(path: Path, key: str) -> np.ndarray:
    """The array `key` of a MATLAB file, without dimensions of length 1.

    Raises:
        UserError: the file is missing or damaged, or has no such array.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise UserError(f"The annotation file {path} is missing. {AGAIN}")
    try:
        content = loadmat(path, squeeze_me=True)
    except (*BROKEN, MatReadError) as error:
        raise UserError(f"The annotation file {path} is damaged ({error}). {AGAIN}") from error
    if key not in content:
        raise UserError(f"The annotation file {path} has no array '{key}'. {AGAIN}")
    return np.atleast_1d(content[key])


def number(text: str, path: Path) -> int:
    """An integer of the annotation file `path`.

    Raises:
        UserError: the text is no integer.
    """
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{path} has '{text}' where a number is expected. {AGAIN}") from error


def images_below(folder: Path) -> list[str]:
    """Sorted paths of the image files below a folder, with slashes; the order is the same on every machine."""
    return [name for name in Folder(folder).names if is_image(name)]


UNITS = {"classes": "classes", "all": "images"}
AGAIN = "Unpack the dataset's archive again, or copy the file from it."
