"""Readers of the annotation files of public datasets; their messages name file and line."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ditune.data.formats import is_image
from ditune.data.images import BROKEN
from ditune.data.sources import Folder
from ditune.errors import UserError

AGAIN = "Unpack the dataset's archive again, or copy the file from it."


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
