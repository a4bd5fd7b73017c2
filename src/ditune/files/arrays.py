"""Bounds on numpy's files from anywhere: what a header claims is compared with the file before memory is taken."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from ditune.memory import host_memory, size

ZIPS = (b"PK\x03\x04", b"PK\x05\x06")  # how a zip file begins, and an empty one
READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def refuse_absurd(path: Path) -> None:
    """Compare the headers of a .npy or .npz with its content and with the free memory; reads no numbers.

    Args:
        path: the file.

    Raises:
        ValueError: an array claims more than the file has, or more than fits into memory; or there is no header.
        OSError, zipfile.BadZipFile, EOFError, RuntimeError: the file is missing, damaged or encrypted.
    """
    with path.open("rb") as file:
        if file.read(4) not in ZIPS:  # as numpy tells them apart
            file.seek(0)
            return _check(file, path.stat().st_size, "the array")
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                with archive.open(info) as file:
                    _check(file, info.file_size, info.filename)
    return None


def _check(file: IO[bytes], length: int, name: str) -> None:
    version = np.lib.format.read_magic(file)
    if version not in READERS:
        raise ValueError(f"{name} is of numpy's format {version}, which holds no plain numbers")
    shape, _, kind = READERS[version](file)
    claimed, there, free = math.prod(shape) * kind.itemsize, length - file.tell(), host_memory()[0]
    if claimed > there:
        raise ValueError(f"{name} claims {size(claimed)} of numbers, and {size(there)} are there")
    if claimed > free:
        raise ValueError(f"{name} needs {size(claimed)} of memory, and {size(free)} are free")
