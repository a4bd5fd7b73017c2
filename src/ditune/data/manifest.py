"""The manifest of a dataset: a CSV file of all images with their hashes, as src/prepare.py has verified them.

Its last line holds the SHA-256 of those before; manifests of earlier versions have none.
"""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ditune.data.sources import Item
from ditune.errors import UserError
from ditune.files.atomic import atomic

COLUMNS = ("source", "file_name", "split", "class", "bytes", "crc32", "sha256", "problem")
CHECKSUM = b"#sha256,"  # begins the last line
ASKED_AT_ONCE = 16  # sizes of files
REMEDY = "Run `python src/prepare.py` for it again."


class Check(NamedTuple):
    """Result of reading an image's file.

    Args:
        size: in bytes; -1 = there is no file.
        crc32: of the file.
        sha256: of the file, hex.
        problem: why the image cannot be used; "" = nothing.
    """

    size: int
    crc32: int
    sha256: str
    problem: str


def describe(items: Sequence[Item]) -> list[tuple[str, str, str, str]]:
    """Identity and label of each image: (number of its source, name, split, class)."""
    numbers: dict[int, int] = {}
    return [
        (str(numbers.setdefault(id(item.source), len(numbers))), item.name, item.split, item.class_name)
        for item in items
    ]


def write_manifest(path: Path, items: Sequence[Item], checked: Sequence[Check]) -> None:
    """Write a manifest, one row per image.

    Args:
        path: the file.
        items: all images of a dataset.
        checked: the result for each of them.
    """
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for who, found in zip(describe(items), checked, strict=True):
            writer.writerow((*who, *found))
        file.flush()
        with temporary.open("r+b") as written:
            checksum = hashlib.file_digest(written, "sha256").hexdigest()  # at the end of the file now
            written.write(CHECKSUM + checksum.encode() + b"\r\n")


def read_manifest(path: Path) -> list[dict[str, str]]:
    """Rows of a manifest, by the names in `COLUMNS`.

    Raises:
        UserError: it is damaged.
    """
    content, checksum = _parts(path)
    if checksum not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(f"The manifest {path} is damaged: it is not what was written. {REMEDY}")
    try:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The manifest {path} is damaged ({error}). {REMEDY}") from error
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row or None in row.values() for row in rows):
        raise UserError(f"The manifest {path} is damaged, or of an earlier version. {REMEDY}")
    return rows


def manifest_hash(path: Path) -> str:
    """SHA-256 (hex) of a manifest without its checksum: that of the file as earlier versions wrote it."""
    return hashlib.sha256(_parts(path)[0]).hexdigest()


def _parts(path: Path) -> tuple[bytes, str | None]:
    """The rows of a manifest, and the checksum in its last line; None = it has none."""
    content = path.read_bytes()
    start = content.rfind(b"\n", 0, -1) + 1
    if not content.startswith(CHECKSUM, start):
        return content, None
    return content[:start], content[start + len(CHECKSUM) :].decode(errors="replace").removesuffix("\r\n")


def is_current(items: Sequence[Item], rows: Sequence[dict[str, str]]) -> bool:
    """Whether the rows of a manifest are of these images with these labels and splits; no image is read."""
    return describe(items) == [(row["source"], row["file_name"], row["split"], row["class"]) for row in rows]


class Known(NamedTuple):
    """What a manifest says about a whole image.

    Args:
        size: bytes of its file.
        crc32: of its file.
    """

    size: int
    crc32: int


def apply_manifest(items: list[Item], path: str | Path | None) -> tuple[dict[Item, Known], list[Item]]:
    """Leave out what a manifest calls broken.

    Args:
        items: all images of a dataset.
        path: the manifest; if there is none, all images are kept.

    Returns:
        Size and CRC-32 of each image that is kept ({} without a manifest), and these images.

    Raises:
        UserError: the manifest is of other images or labels, or damaged.
    """
    if path is None or not Path(path).is_file():
        return {}, items
    rows = read_manifest(Path(path))
    if not is_current(items, rows):
        raise UserError(f"The manifest {path} is of other images, labels or splits than those there now. {REMEDY}")
    try:
        kept = {
            item: Known(int(row["bytes"]), int(row["crc32"]))
            for item, row in zip(items, rows, strict=True)
            if not row["problem"]
        }
    except ValueError as error:
        raise UserError(f"The manifest {path} is damaged ({error}). {REMEDY}") from error
    return kept, list(kept)


def refuse_replaced(items: Sequence[Item], known: Mapping[Item, Known]) -> None:
    """Compare the sizes of files with those of the manifest, where they are known without reading.

    Files are asked for side by side, because each answer of a network disk takes its time.

    Raises:
        UserError: an image has another size.
    """
    asked = [item for item in items if item in known and item.source.knows_sizes]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for item, size in zip(asked, pool.map(lambda item: item.source.size(item.name), asked), strict=True):
            if size not in (known[item].size, -1):  # that there is none is said where it is read
                raise replaced(item)


def replaced(item: Item) -> UserError:
    """The error for an image that is another one than the manifest knows."""
    return UserError(
        f"The image {item.name} in {item.source.path} is another file than when it was verified. Put the old one back, "
        "or run `python src/prepare.py` with the same data= and again=true to take the new one."
    )
