"""What the public data sets share: where their files come from, how their annotations are read, what is checked.

A data set is a file with one class: its official layout becomes labelled pictures, in the order of its own lists.
"""

import csv
import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from ditune.data.archives import Archive, install
from ditune.data.formats import is_picture
from ditune.data.images import BROKEN, Pictures
from ditune.data.sources import Folder, Item
from ditune.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One picture as the annotations have it: path below the top folder, label 0 .. K-1, split."""

    name: str
    label: int
    split: str


class Benchmark(Pictures):
    """Pictures of a public data set in its official layout.

    root        folder that holds the data set's top folder, or that folder itself
    resolution  side of the square pictures, in pixels
    split       train, test or val as the data set has them; None = all
    manifest    file written by src/prepare.py: broken pictures are left out, checksums are known without reading
    in_memory   decode everything at the first access; False = decode what is asked for
    limit       keep this many, evenly spaced

    Raises UserError when the files are not there (with what to put where), or annotations are missing or damaged.
    """

    title: ClassVar[str]
    homepage: ClassVar[str]
    licence: ClassVar[str]  # shown before the first download
    archives: ClassVar[tuple[Archive, ...]]
    by_hand: ClassVar[str] = ""  # what to do where no address works
    tops: ClassVar[tuple[str, ...]]  # names of the top folder; "" = the root itself
    marker: ClassVar[str]  # a path that every top folder has
    published: ClassVar[dict[str, int]]  # pictures of each split, and `classes`

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
        """The top folder; None when the data set is not there."""
        return find_top(root, cls.tops, cls.marker)

    @classmethod
    @abstractmethod
    def read(cls, top: Path) -> tuple[list[str], list[Record]]:
        """Class names in the order of their labels, and all pictures of all splits."""

    @classmethod
    def check(cls, class_names: Sequence[str], records: Sequence[Record]) -> None:
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
    def fetch(cls, root: Path, download: bool) -> None:
        """Bring the data set to `root`: from archives that lie there, or from its address; what is there is left.

        Raises:
            UserError: a file is missing (with what to put where), cannot be fetched, or is damaged.
        """
        top = cls.find(root)
        if top is not None and top != root / cls.tops[0]:
            return  # its top folder itself, or another of its layouts
        absent = [archive for archive in cls.archives if not (root / archive.makes).exists()]
        if any(archive.find(root) is None and archive.urls for archive in absent) and download:
            log.warning("%s will be fetched. %s See %s.", cls.title, cls.licence, cls.homepage)
        for archive in absent:
            install(archive, root, download)
        if cls.find(root) is None:
            raise UserError(cls.missing(root))

    @classmethod
    def missing(cls, root: Path) -> str:
        """What to put where, when the data set is not in `root`."""
        files = [f"{root / a.file}" + (f" (from {a.urls[0]})" if a.urls else "") for a in cls.archives if a.needed]
        top = root / cls.tops[0] / cls.marker
        hand = f" {cls.by_hand}" if cls.by_hand else ""
        command = f"python src/prepare.py data={cls.__module__.rpartition('.')[2]}"
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
            f"{self.title} has {found.get(key, 0):,} {UNITS.get(key, f'pictures in {key}')}, published are {count:,}"
            for key, count in self.published.items()
            if found.get(key, 0) != count
        ]


def find_top(root: Path, tops: Iterable[str], marker: str) -> Path | None:
    """The folder with `marker` in it: one of `tops` below `root`, or `root`."""
    return next((root / top for top in (*tops, "") if (root / top / marker).exists()), None)


def read_lines(path: Path) -> list[str]:
    """Lines of an annotation file that are not empty; UserError when it is missing or no text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"The annotation file {path} is missing. {AGAIN}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The annotation file {path} is damaged ({error}). {AGAIN}") from error
    return [line.strip() for line in lines if line.strip()]


def read_table(path: Path, columns: int) -> list[list[str]]:
    """Rows of an annotation file, split at blanks into `columns` fields; the last keeps its blanks."""
    rows = [line.split(maxsplit=columns - 1) for line in read_lines(path)]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise UserError(f"Line {number} of {path} has {len(row)} fields, not {columns}. {AGAIN}")
    return rows


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a head line that has at least `columns`."""
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
    """One array of a MATLAB file, without dimensions of length 1."""
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
    """An integer of an annotation file."""
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{path} has '{text}' where a number is expected. {AGAIN}") from error


def pictures_below(folder: Path) -> list[str]:
    """Sorted paths of the picture files below a folder; the order of a directory differs between machines."""
    return [name for name in Folder(folder).names if is_picture(name)]


UNITS = {"classes": "classes", "all": "pictures"}
AGAIN = "Unpack the data set's archive again, or copy the file from it."
