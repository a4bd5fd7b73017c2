"""The files of a dataset with their hashes, as src/prepare.py has verified them: one CSV file, whole or not there."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ditune.data.sources import Item
from ditune.errors import UserError
from ditune.files.atomic import atomic

COLUMNS = ("source", "file_name", "split", "class", "bytes", "crc32", "sha256", "problem")
REMEDY = "Run `python src/prepare.py` for it again."


class Check(NamedTuple):
    """What reading an image's file has shown."""

    size: int  # bytes; -1 = there is no file
    crc32: int
    sha256: str
    problem: str  # '' = none


def describe(items: Sequence[Item]) -> list[tuple[str, str, str, str]]:
    """What tells the images apart and labels them: number of the source, name, split, class."""
    numbers: dict[int, int] = {}
    return [
        (str(numbers.setdefault(id(item.source), len(numbers))), item.name, item.split, item.class_name)
        for item in items
    ]


def write_manifest(path: Path, items: Sequence[Item], checked: Sequence[Check]) -> None:
    """One row for each image."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for who, found in zip(describe(items), checked, strict=True):
            writer.writerow((*who, *found))


def read_manifest(path: Path) -> list[dict[str, str]]:
    """Rows of a manifest; UserError when it is damaged."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The manifest {path} is damaged ({error}). {REMEDY}") from error
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row.values() for row in rows):
        raise UserError(f"The manifest {path} is damaged, or of an earlier version. {REMEDY}")
    return rows


def is_current(items: Sequence[Item], rows: Sequence[dict[str, str]]) -> bool:
    """True when a manifest is of these images with these labels and splits; the files are not read."""
    return describe(items) == [(row["source"], row["file_name"], row["split"], row["class"]) for row in rows]


def apply_manifest(items: list[Item], path: str | Path | None) -> tuple[dict[Item, int], list[Item]]:
    """The CRC-32 of each sound image, and the sound images; nothing and all of them where there is no manifest.

    Raises UserError when the manifest is of other images or labels.
    """
    if path is None or not Path(path).is_file():
        return {}, items
    rows = read_manifest(Path(path))
    if not is_current(items, rows):
        raise UserError(f"The manifest {path} is of other images, labels or splits than those there now. {REMEDY}")
    kept = [(item, int(row["crc32"])) for item, row in zip(items, rows, strict=True) if not row["problem"]]
    return dict(kept), [item for item, _ in kept]
