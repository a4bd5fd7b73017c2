"""Where files of pictures lie: a folder or a zip file, read by the same four names (path, names, read, crc)."""

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ditune.errors import UserError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
SPLIT_FOLDERS = frozenset({"train", "test", "val"})
METADATA = "metadata.csv"


def is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """True for dot files, what lies in dot folders, and the resource forks that macOS adds to its zip files."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


class Folder:
    """A folder and all below it; `names` are sorted and relative, with slashes (None = looked up)."""

    def __init__(self, path: Path, names: list[str] | None = None) -> None:
        self.path = path
        if names is not None:
            self.names = names
            return
        files = (Path(top, file) for top, _, found in os.walk(path, followlinks=True) for file in found)
        names = (file.relative_to(path).as_posix() for file in files)
        self.names = sorted(name for name in names if not is_hidden(name))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        """Bytes; -1 when there is no such file."""
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return -1

    def crc(self, name: str) -> int:
        """CRC-32 of the bytes; reads the file."""
        return zlib.crc32(self.read(name))


class Zip:
    """A zip file, never unpacked; one folder around everything, as file managers add it, is left out of `names`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive, self._process = zipfile.ZipFile(path), os.getpid()
        for name in self._archive.namelist():
            _refuse_escape(name, path)
        entries = [info for info in self._archive.infolist() if not info.is_dir() and not is_hidden(info.filename)]
        prefix = _wrapper([info.filename for info in entries])
        self._entries = {info.filename.removeprefix(prefix): info for info in entries}
        self.names = sorted(self._entries)

    def read(self, name: str) -> bytes:
        # A forked worker shares the file position with its parent, so every process opens the file for itself.
        if self._process != os.getpid():
            self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._archive.read(self._entries[name])

    def size(self, name: str) -> int:
        """Bytes of the picture."""
        return self._entries[name].file_size

    def crc(self, name: str) -> int:
        """CRC-32 of the bytes, as the directory of the zip file gives it."""
        return self._entries[name].CRC

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None, "_process": None}


@dataclass(frozen=True, eq=False)
class Item:
    """One picture and what its source says about it."""

    source: Folder | Zip
    name: str  # path inside the source
    class_name: str
    split: str
    row: dict[str, str]  # the row of metadata.csv, or only file_name


def open_source(path: str | Path) -> Folder | Zip:
    """The folder or zip file at `path`; UserError when there is none or it cannot be read."""
    path = Path(path).expanduser()
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise UserError(
            f"There is nothing at {path}, where a folder of pictures or a zip file of them is expected. "
            "Correct the path, or put the pictures there."
        )
    try:
        return Zip(path)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is not a whole zip file ({error}). Copy or download it again, or give a folder of pictures."
        ) from error


def _refuse_escape(name: str, path: Path) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or (parts and (parts[0] == "/" or parts[0].endswith(":"))):
        raise UserError(
            f"The zip file {path} holds the name '{name}', which points outside of it. "
            "Do not trust this file; make a new one from pictures that you know."
        )


def _wrapper(names: list[str]) -> str:
    """'name/' of the one folder around everything, or '': it must hold metadata.csv or only further folders."""
    tops = {PurePosixPath(name).parts[0] for name in names}
    if len(tops) != 1 or tops <= SPLIT_FOLDERS:
        return ""
    top = tops.pop()
    deep = all(len(PurePosixPath(name).parts) > 2 for name in names if is_picture(name))
    return f"{top}/" if deep or f"{top}/{METADATA}" in names else ""
