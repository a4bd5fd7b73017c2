"""Atomic writing, so that a reader sees the old file or the new one, never half of one; and hashes of files."""

import errno
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

from ditune.errors import UserError
from ditune.files.locks import locked
from ditune.progress import meter

log = logging.getLogger(__name__)

LARGE = 100_000_000  # bytes from which reading shows its progress
BLOCK = 1 << 20

NAME_BYTES = 200  # of the target's name in that of its temporary file; file systems allow 255 in all
# how numpy, torch and safetensors, which raise errors of their own, say that a file could not be written
FAILED_WRITE = re.compile(
    r"requested and \d+ written|failed writing|unexpected pos|iostream error|open file failed with|os error (\d+)"
)
TEMPORARY = re.compile(r"\.tmp-(?:(\w+)-)?(\d+)$")  # machine (not in earlier versions) and process of the writer
FORGOTTEN = 24 * 3600  # seconds after which a temporary file of another machine counts as left over

_hashes: dict[tuple[Path, tuple[int, ...]], str] = {}  # of files in one state, so that a process reads them once
_kept_in: Path | None = None  # see keep_hashes_in


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed into place.

    The temporary file lies in the same folder, because a rename is atomic only within one file system.

    Args:
        path: of the file; its folder is created if missing.

    Raises:
        OSError: the file cannot be written; `filename` is `path`. `ditune.errors.refusal` makes a sentence of it.
    """
    path = Path(path)
    name = path.name.encode()[:NAME_BYTES].decode(errors="ignore")
    temporary = path.with_name(f".{name}.tmp-{_machine()}-{os.getpid()}")
    try:
        with _named(temporary, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.umask(mask := os.umask(0))
            temporary.chmod(0o666 & ~mask)  # some writers keep others from reading
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # where the folder is none, there is nothing to remove either
            temporary.unlink(missing_ok=True)


@contextmanager
def _named(temporary: Path, path: Path) -> Iterator[None]:
    """Make a failed write of `temporary`, by any library, an OSError that names `path`."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        failed = FAILED_WRITE.search(str(error))
        if code is not None and error.filename not in (None, str(temporary)):
            raise  # of another file
        if code is None and failed is None:
            raise
        code = code or int(failed[1] or _cause(temporary))
        raise OSError(code, os.strerror(code), str(path)) from error


def _cause(temporary: Path) -> int:
    """Number of the error with which a file was refused, where a library has kept only that it was: by going on."""
    try:
        with temporary.open("ab", buffering=0) as file:
            file.write(bytes(2**20))
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EIO


@cache
def _machine() -> str:
    """A short name of this machine: processes of several ones may write into one folder."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files below a folder whose writers are gone; a kill leaves them no time to clean up.

    A writer on another machine cannot be asked, so its file goes when it is a day old.
    """
    for path in folder.rglob(".*.tmp-*"):
        with suppress(FileNotFoundError):  # its writer has just ended
            if _is_left_over(path):
                path.unlink()


def _is_left_over(path: Path) -> bool:
    name, written = TEMPORARY.search(path.name), path.stat().st_mtime
    if name is None or not path.is_file():
        return False
    if name[1] not in (None, _machine()):
        return time.time() - written > FORGOTTEN
    try:
        # a process that began after the last writing has only the number of the writer
        return psutil.Process(int(name[2])).create_time() > written + 1
    except (psutil.NoSuchProcess, OverflowError):
        return True


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged file to <name>.damaged, with a warning, so that another one can be written in its place.

    Args:
        path: of the file.
        reason: why it cannot be used.
    """
    aside = path.with_name(f"{path.name}.damaged")
    with suppress(FileNotFoundError):  # another rank has been faster
        os.replace(path, aside)
    log.warning("%s is damaged (%s) and set aside as %s", path, reason, aside.name)


def write_json(path: Path | str, content: dict) -> None:
    """Write a JSON file, indented, UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> dict:
    """Content of a JSON file that holds an object.

    Args:
        path: of the file.

    Raises:
        UserError: the file is missing, damaged, or holds no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}. Correct the path, or put the file there.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Copy it again, or delete it to make a new one.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object. Copy it again, or delete it to make a new one.")
    return content


def keep_hashes_in(folder: Path | None) -> None:
    """Keep the hashes of large files, so that of several processes one computes them, and later ones none.

    Args:
        folder: created when needed; None = every process computes them. If it cannot be written, likewise.
    """
    global _kept_in
    _kept_in = folder


def read_or_set_aside(path: Path | str) -> dict:
    """Content of a JSON file that can be written again; {} if there is none.

    A damaged one is renamed to <name>.damaged, and a warning says so.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except UserError as error:
        aside = path.with_name(f"{path.name}.damaged")
        with suppress(FileNotFoundError):  # another rank was faster
            os.replace(path, aside)
        log.warning("%s It is kept as %s.", str(error).partition(" Copy it")[0], aside.name)
        return {}


def sha256(path: Path | str) -> str:
    """SHA-256 (hex) of a file; of a folder, that of the names and hashes of its files."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    path = path.resolve()
    state = _state(path)
    if (path, state) not in _hashes:
        is_shared = _kept_in is not None and path.stat().st_size > LARGE
        _hashes[path, state] = _shared(path, state, _kept_in) if is_shared else _digest(path)
    return _hashes[path, state]


def _state(path: Path) -> tuple[int, ...]:
    """Numbers of which one changes whenever the file does."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def _shared(path: Path, state: tuple[int, ...], folder: Path) -> str:
    """The hash of a file in one state, which other processes compute, or have computed, too."""
    entry = folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    with ExitStack() as held:
        try:
            held.enter_context(locked(entry.with_suffix(".lock")))
        except (OSError, UserError) as error:
            log.info("the hash of %s is not shared with other processes: %s", path, error)
            return _digest(path)
        with suppress(UserError):  # there is none, or it is damaged: a new one is written
            known = read_json(entry)
            if known.get("state") == list(state):
                return known["sha256"]
        found = _digest(path)
        if _state(path) == state:  # else it is being written
            with suppress(OSError):  # a full disk only costs time
                write_json(entry, {"file": str(path), "state": state, "sha256": found})
        return found


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, block = hashlib.sha256(), bytearray(BLOCK)
        with meter(f"hashing {path.name}", size, "bytes") as progress:
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
                progress.advance(count)
        return digest.hexdigest()
