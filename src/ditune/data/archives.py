"""Published archives of a dataset: found or fetched, verified, and unpacked so that nothing leaves its folder."""

import logging
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ditune.data.formats import is_hidden
from ditune.errors import UserError
from ditune.files.download import check_md5, fetch_any, record_first_use

log = logging.getLogger(__name__)

TAR, ZIP = (".tar", ".tgz", ".tar.gz"), (".zip",)
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class Archive:
    """A published file of a dataset.

    Args:
        file: its name.
        makes: path below the root that exists once it has been unpacked; the file's own path if it is not packed.
        urls: where it can be fetched; () = by hand only.
        md5: as published; None = none is published, and its hash is recorded at the first use.
        into: folder below the root that it is unpacked into.
        inner: ending of the archives inside that hold the images; None = there are none.
        needed: False = the dataset can be read without it.
    """

    file: str
    makes: str
    urls: tuple[str, ...] = ()
    md5: str | None = None
    into: str = "."
    inner: str | None = None
    needed: bool = True

    def at(self, mirrors: Sequence[str]) -> "Archive":
        """The same archive at other addresses of folders; () = where it is."""
        return replace(self, urls=tuple(f"{url.rstrip('/')}/{self.file}" for url in mirrors)) if mirrors else self

    def find(self, root: Path) -> Path | None:
        """Path of the file, if it lies in or below the root; else None."""
        return next((path for path in (root / self.file, root / self.into / self.file) if path.is_file()), None)


def install(archive: Archive, root: Path, download: bool) -> bool:
    """Fetch and unpack an archive so that `root / archive.makes` exists.

    Args:
        archive: the file.
        root: folder of the dataset.
        download: whether it may be downloaded.

    Returns:
        False if there is neither a file nor an address.

    Raises:
        UserError: it cannot be fetched, is damaged, or holds what must not be unpacked. Nothing is left half unpacked.
    """
    found = archive.find(root)
    if found is None:
        if not (download and archive.urls):
            return False
        found = root / archive.file
        fetch_any(archive.urls, found, archive.md5)
    elif archive.md5 is not None:
        log.info("checking %s", found)
        check_md5(found, archive.md5)
    if archive.md5 is None:
        record_first_use(found, archive.urls[0] if archive.urls else None)
    if not found.name.endswith(TAR + ZIP):
        target = root / archive.makes
        target.parent.mkdir(parents=True, exist_ok=True)
        if found != target:
            found.rename(target)
        return True
    log.info("unpacking %s", found)
    with _empty(root / f".unpacking-{archive.file}") as folder:
        unpack(found, folder)
        _drop_hidden(folder)
        if archive.inner:
            _unpack_inner(folder, archive.inner)
        _move(folder, root / archive.into, root / archive.makes)
    return True


def unpack(path: Path, folder: Path) -> None:
    """Unpack a tar or zip file.

    Args:
        path: the file.
        folder: to unpack into.

    Raises:
        UserError: it is damaged or truncated, or holds links, devices, or names that point outside of the folder.
    """
    try:
        if path.name.endswith(ZIP):
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
                for info in infos:
                    kind = stat.S_IFMT(info.external_attr >> 16)
                    _refuse(path, info.filename, kind not in (0, stat.S_IFREG, stat.S_IFDIR))
                _need(folder, sum(info.file_size for info in infos))
                archive.extractall(folder)  # checks CRCs
        else:
            _refuse_open_end(path)
            with tarfile.open(path) as archive:
                for member in archive:
                    _refuse(path, member.name, not (member.isreg() or member.isdir()))
                    _need(folder, member.size)
                    archive.extract(member, folder, filter="data")
    except BROKEN as error:
        raise UserError(
            f"{path} cannot be unpacked ({error or type(error).__name__}): it is truncated or damaged, or the disk is "
            "full. Delete it and fetch it again."
        ) from error


def _refuse_open_end(path: Path) -> None:
    """A tar file that was cut between two members reads well, but does not end in a block of zeros."""
    if path.suffix == ".tar" and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-512, 2)
            if any(file.read()):
                raise tarfile.ReadError("it does not end as a tar file does")


def _refuse(path: Path, name: str, special: bool) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    outside = ".." in parts or (parts and (parts[0] == "/" or parts[0].endswith(":")))
    if special or outside:
        what = "points outside of it" if outside else "is a link or a device"
        raise UserError(f"{path} holds the entry '{name}', which {what}. Do not trust this file; fetch it again.")


def _need(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder} has {free:,} free bytes, and {size:,} are needed. Free some, or use another disk.")


def _drop_hidden(folder: Path) -> None:
    """Remove what only the packing system wanted, such as __MACOSX."""
    for entry in list(folder.iterdir()):
        if is_hidden(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _unpack_inner(folder: Path, ending: str) -> None:
    """Replace the contents of `folder` by those of its archives; one with loose files gets a folder of its name."""
    inner = sorted(path for path in folder.rglob(f"*{ending}") if not is_hidden(path.relative_to(folder).as_posix()))
    if not inner:
        raise UserError(f"There is no *{ending} in the archive, where the images should be. Fetch it again.")
    result = folder / ".inner"
    for path in inner:
        with _empty(folder / ".one") as one:
            unpack(path, one)
            entries = [entry for entry in one.iterdir() if not is_hidden(entry.name)]
            if len(entries) == 1 and entries[0].is_dir():
                _move(one, result, result / entries[0].name)
            else:
                _move(one, result / path.name.removesuffix(ending), result / path.name.removesuffix(ending))
        path.unlink()
    for entry in list(folder.iterdir()):
        if entry != result:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in list(result.iterdir()):
        entry.rename(folder / entry.name)
    result.rmdir()


def _move(folder: Path, into: Path, makes: Path) -> None:
    """Rename what is in `folder` to `into`; `makes` comes last, because it stands for the whole."""
    if makes == into:
        _replace(folder, into)
        folder.mkdir()  # the caller's, to be removed
        return
    into.mkdir(parents=True, exist_ok=True)
    for entry in sorted(folder.iterdir(), key=lambda entry: into / entry.name == makes):
        _replace(entry, into / entry.name)
    if not makes.exists():
        raise UserError(f"The archive holds no {makes.name}. Fetch it again, or unpack it by hand so that {makes} is.")


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


@contextmanager
def _empty(folder: Path) -> Iterator[Path]:
    """A new folder, which is gone afterwards whatever happens."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
