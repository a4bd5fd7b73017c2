"""Where images lie: a folder, a zip file or Parquet files, all with the same interface `Source`."""

import os
import stat
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ditune.data.formats import is_hidden, is_image, is_metadata
from ditune.data.splits import is_split
from ditune.data.walk import files_below
from ditune.errors import UserError

PARQUET = ".parquet"
TAR = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
LARGEST, LARGEST_TABLE = 100 * 2**20, 2**30  # bytes of an image and of a table in a zip file
RATIO, SMALL = 200, 16 * 2**20  # packed more tightly than this is no image; what is small may be of one colour
ONE_CLASS = "all"  # class of images that lie in no folder, or have no label


class Source(Protocol):
    """What datasets need of a place where images lie."""

    path: Path  # the folder or file, for messages
    names: list[str]  # sorted names of its files, relative and with slashes
    others: list[str]  # names of files in it that are neither images nor metadata
    notes: list[str]  # sentences about what was left out or reinterpreted
    knows_sizes: bool  # whether `size` answers without reading the images

    def read(self, name: str) -> bytes:
        """The bytes of a file."""

    def size(self, name: str) -> int:
        """Number of bytes; -1 when there is no such file."""

    def crc(self, name: str) -> int:
        """CRC-32 of the bytes."""


class Folder:
    """A folder and all below it.

    Args:
        path: of the folder.
        names: sorted, relative, with slashes; None = look them up.
        moved: folders that stand for the first part of names, where it does not lie in `path`.

    Raises:
        UserError: a folder cannot be read, or a name is no UTF-8.
    """

    knows_sizes = True

    def __init__(self, path: Path, names: list[str] | None = None, moved: Mapping[str, Path] | None = None) -> None:
        self.path, self._moved = path, moved or {}
        self.notes: list[str] = []
        if names is None:
            names, links = files_below(path)
            self.notes += _links_note(path, links)
        self.names = names
        self.others = _others(names)

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return self._place(name).read_bytes()

    def size(self, name: str) -> int:
        """Bytes; -1 when there is no such file."""
        try:
            return self._place(name).stat().st_size
        except OSError:
            return -1

    def crc(self, name: str) -> int:
        """CRC-32 of the bytes; reads the file."""
        return zlib.crc32(self.read(name))

    def _place(self, name: str) -> Path:
        first, _, inside = name.partition("/")
        return self._moved[first] / inside if first in self._moved else self.path / name


class Zip:
    """A zip file, which is never unpacked; folders around everything, as file managers add them, are not in `names`.

    Args:
        path: of the file.
        classes: names that are known to be classes; a folder of such a name is never one around everything.

    Raises:
        UserError: it holds names that lead out of it.
        zipfile.BadZipFile: it is no zip file, or damaged.
    """

    knows_sizes = True

    def __init__(self, path: Path, classes: Collection[str] = ()) -> None:
        self.path = path
        self._archive, self._process = zipfile.ZipFile(path), os.getpid()
        entries = {info.filename.replace("\\", "/"): info for info in self._archive.infolist() if not info.is_dir()}
        for name in self._archive.namelist():
            _refuse_escape(name, path)
        links = [name for name, info in entries.items() if stat.S_ISLNK(info.external_attr >> 16)]
        names = sorted(name for name in entries.keys() - set(links) if not is_hidden(name))
        prefix, self.others = wrapper(names, classes), _others(names)
        self.notes = _wrapper_note(path, prefix)
        if links:
            self.notes.append(f"Links in {path}, which a zip file does not follow, are left out: {len(links):,}.")
        if again := sum(not info.is_dir() for info in self._archive.infolist()) - len(entries):
            self.notes.append(f"Names that {path} holds already, the last of which counts: {again:,}.")
        self._entries = {name.removeprefix(prefix): entries[name] for name in names if name.startswith(prefix)}
        self.names = sorted(self._entries)

    def read(self, name: str) -> bytes:
        """The bytes of a file; zipfile checks their CRC.

        Raises:
            ValueError: it is larger than a file of its kind, or packed as tightly as only nonsense is.
        """
        info = self._entries[name]
        refuse_bomb(info.file_size, info.compress_size, LARGEST if is_image(name) else LARGEST_TABLE)
        # A forked worker shares the file position with its parent, so every process opens the file for itself.
        if self._process != os.getpid():
            self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
        with self._archive.open(info) as file:
            return file.read(info.file_size)  # an entry that is longer than it says is not unpacked to its end

    def size(self, name: str) -> int:
        """Bytes of the image."""
        return self._entries[name].file_size

    def crc(self, name: str) -> int:
        """CRC-32 of the bytes, as the directory of the zip file gives it."""
        return self._entries[name].CRC

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None, "_process": None}


@dataclass(frozen=True, eq=False)
class Item:
    """One image and what its source says about it.

    Args:
        source: where it lies.
        name: path inside the source.
        class_name: its class.
        split: None = by a hash of the name.
        row: its row of the metadata, or only file_name.
    """

    source: Source
    name: str
    class_name: str
    split: str | None
    row: dict[str, str]


def open_source(path: str | Path, classes: Collection[str] = ()) -> Source:
    """The folder, zip file or Parquet file at `path`.

    Args:
        path: a folder or a file.
        classes: names that are known to be classes; a folder of such a name is never one around everything.

    Raises:
        UserError: there is nothing, or it cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, classes)
    if not path.exists():
        raise UserError(
            f"There is nothing at {path}, where a folder of images or a zip file of them is expected. "
            "Correct the path, or put the images there."
        )
    if path.suffix.lower() == PARQUET:
        return _open_parquet(path.parent, [path.name], path)
    try:
        return Zip(path, classes)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # other versions, names that are no text
        if path.name.lower().endswith(TAR):
            raise UserError(
                f"{path} is a tar archive, and images are read from folders, zip and Parquet files. Unpack it and give "
                "the folder; archives of public datasets are unpacked by data=<its name> data.root=<folder of the "
                "archive>."
            ) from error
        raise UserError(
            f"{path} is not a whole zip file ({error}). Copy or download it again, or give a folder of images."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). Allow reading it, or give another path.") from error


def _open_folder(path: Path, classes: Collection[str]) -> Source:
    folder = Folder(path)
    tables = [name for name in folder.names if PurePosixPath(name).suffix.lower() == PARQUET]
    if tables and not any(map(is_image, folder.names)):
        return _open_parquet(path, tables, path)
    prefix = wrapper(folder.names, classes)
    if not prefix:
        return folder
    inner = Folder(path / prefix, [name.removeprefix(prefix) for name in folder.names if name.startswith(prefix)])
    inner.others, inner.notes = folder.others, _wrapper_note(path, prefix) + folder.notes
    return inner


def _open_parquet(folder: Path, names: list[str], path: Path) -> Source:
    from ditune.data.parquet import Parquet  # it knows this file

    return Parquet(folder, names, path)


def wrapper(names: Collection[str], classes: Collection[str] = ()) -> str:
    """'name/' or 'name/name/' of the folders around all images and metadata, or ''.

    Such a folder holds metadata or only further folders, and is neither a split nor one of the `classes`.
    """
    inner = [name for name in names if is_image(name) or is_metadata(name)]
    prefix = ""
    while top := _only_top(inner):
        beside = any(is_metadata(name) and name.count("/") == 1 for name in inner)
        deep = all(name.count("/") > 1 for name in inner if is_image(name))
        if is_split(top) or top in classes or not (deep or beside):
            break
        prefix += f"{top}/"
        inner = [name.removeprefix(f"{top}/") for name in inner]
    return prefix


def _only_top(names: list[str]) -> str:
    tops = {name.partition("/")[0] for name in names} if all("/" in name for name in names) else set()
    return tops.pop() if len(tops) == 1 else ""


def _others(names: list[str]) -> list[str]:
    return [name for name in names if not is_image(name) and not is_metadata(name)]


def _wrapper_note(path: Path, prefix: str) -> list[str]:
    return [f"Everything in {path} lies in {prefix}, which stands for the whole and is no class."] if prefix else []


def _links_note(path: Path, links: list[str]) -> list[str]:
    if not links:
        return []
    shown = ", ".join(links[:3]) + (", ..." if len(links) > 3 else "")
    why = "they lead to what is there under another name"
    return [f"Links left out of {path}, because {why}: {len(links):,} ({shown})."]


def refuse_bomb(size: int, packed: int, largest: int) -> None:
    """Refuse content that would fill the memory, before it is read.

    Args:
        size: bytes that it claims to have.
        packed: bytes that it has now.
        largest: bytes that are still believed.

    Raises:
        ValueError: it is larger, or far larger than what is packed.
    """
    if size > largest:
        raise ValueError(f"it claims {size:,} bytes, and up to {largest:,} are read")
    if size > SMALL and size > RATIO * packed:
        raise ValueError(f"it claims {size:,} bytes in {packed:,} packed ones, as no honest file does")


def _refuse_escape(name: str, path: Path) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or (parts and (parts[0] == "/" or parts[0].endswith(":"))):
        raise UserError(
            f"The zip file {path} holds the name '{name}', which points outside of it. "
            "Do not trust this file; make a new one from images that you know."
        )
