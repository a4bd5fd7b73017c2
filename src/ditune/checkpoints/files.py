"""Writing files so that a reader sees the old one or the new one, never half of one; and their hashes."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from ditune.errors import UserError
from ditune.progress import meter

LARGE = 100_000_000  # bytes from which reading shows its progress
BLOCK = 1 << 24


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed into place.

    The temporary file lies in the same folder, because a rename is atomic only within one file system.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)  # some writers keep others from reading
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> dict:
    """Content of a JSON file that holds an object.

    Raises:
        UserError: it is missing or damaged.
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


def sha256(path: Path | str) -> str:
    """SHA-256 (hex) of a file; of a folder, that of the names and hashes of the files in it."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    facts = path.stat()
    return _sha256(path.resolve(), facts.st_size, facts.st_mtime_ns)


@lru_cache
def _sha256(path: Path, size: int, _: int) -> str:
    """Of one state of a file, so that a start that asks several times reads it once."""
    with open(path, "rb") as file:
        if size <= LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        with meter(f"hashing {path.name}", size, "bytes") as progress:
            while block := file.read(BLOCK):
                digest.update(block)
                progress.advance(len(block))
        return digest.hexdigest()
