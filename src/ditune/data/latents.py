"""The latents of a split, encoded once: a folder with a memory-mapped array, labels, and a header of their origin.

latents.npy  of images to train on, float16 (N, 2, M, C, h, w): image, plain or mirrored, mean and log-variance (M = 1:
             mean only); of held-out images float32 (N, C, h, w): the means, as they are when nothing is cached
labels.npy   int64 (N,)
checksums.npy  uint32 (N, 2) or (N,), CRC-32 of each image and side; a process compares a row when it first reads it
header.json  the images (hash of manifest), transform and autoencoder that it was made from; SHA-256 of the small files
"""

import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditune.data.images import ImageDataset
from ditune.data.manifest import manifest_hash
from ditune.errors import UserError
from ditune.files.atomic import read_json, sha256

FORMAT, MEANS = "ditune-latents-1", "ditune-means-1"
TYPES = {FORMAT: np.dtype("<f2"), MEANS: np.dtype("<f4")}
HEADER, ARRAY, LABELS, SUMS = "header.json", "latents.npy", "labels.npy", "checksums.npy"
REMEDY = "Run `python src/prepare.py` with the same data=, autoencoder= and data.resolution= to make it anew."
ANEW = REMEDY.replace("to make", "and again=true to make")


def expected_header(
    dataset: ImageDataset, manifest: Path, autoencoder: str, shape: Sequence[int], moments: int
) -> dict[str, Any]:
    """The header that a cache of these images under this autoencoder must have.

    Args:
        dataset: one split at one resolution.
        manifest: file of the dataset.
        autoencoder: its `latent_fingerprint`.
        shape: (C, h, w) of the latents.
        moments: M, 1 = mean, 2 = mean and log-variance.
    """
    return {
        "format": FORMAT,
        "manifest": manifest_hash(manifest),
        "split": dataset.split,
        "pictures": dataset.fingerprint,
        "transform": f"centre crop of ADM to {dataset.resolution} pixels, RGB",
        "autoencoder": autoencoder,
        "shape": [len(dataset), 2, moments, *shape],
    }


def means_header(header: dict[str, Any]) -> dict[str, Any]:
    """The header of the means of held-out images; `header` is that of their cache as images to train on."""
    count, _, _, *shape = header["shape"]
    return header | {"format": MEANS, "shape": [count, *shape]}


class Cache:
    """A cache that is read row by row.

    Args:
        folder: the cache.
        header: what the cache must say about itself.
        labels: that the cache must have, (N,) int64; None = not known.

    Raises:
        UserError: the cache is missing, damaged, or has another header or other labels; or, when a row is read, it is
            not what was written.
    """

    in_memory = False

    def __init__(self, folder: Path, header: dict[str, Any], labels: Tensor | None = None) -> None:
        found = check(folder, header, labels)
        self.folder, self.shape = folder, tuple(found["shape"])
        # caches of earlier versions have none
        self._sums = np.load(folder / SUMS, allow_pickle=False) if SUMS in found.get("sha256", {}) else None
        self.labels = torch.from_numpy(np.load(folder / LABELS, allow_pickle=False))  # (N,)
        self._array: np.ndarray | None = None
        self._compared: np.ndarray | None = None  # of each checksum, whether this process has done it

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def array(self) -> np.ndarray:
        """All rows, mapped from the file; every process maps it for itself."""
        if self._array is None:  # np.memmap would look at every result that is taken from it
            self._array = np.lib.format.open_memmap(self.folder / ARRAY, mode="r").view(np.ndarray)
        return self._array

    def _rows(self, *where: np.ndarray) -> Tensor:
        """Rows (B, ...) at positions in the first axes of the array, compared with their checksums when first read."""
        rows = self.array[where]
        if self._sums is not None:
            self._compare(rows, where)
        return torch.from_numpy(rows)

    def _compare(self, rows: np.ndarray, where: tuple[np.ndarray, ...]) -> None:
        """Later passes read what the system keeps in memory, and a checksum takes longer than reading the row."""
        if self._compared is None:
            self._compared = np.zeros(self._sums.shape, dtype=bool)
        new = np.flatnonzero(~self._compared[where])
        if not len(new):
            return
        expected = self._sums[where]
        for i in new:
            if zlib.crc32(rows[i]) != expected[i]:
                raise UserError(
                    f"The latent cache {self.folder} is damaged: row {where[0][i]} of {ARRAY} is not what was "
                    f"written. {ANEW}"
                )
        self._compared[where] = True

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_array": None, "_compared": None}


class Latents(Cache):
    """Batches of images to train on; the stream of a training reads it as it reads an `ImageDataset`."""

    def take(self, indices: Sequence[int], mirrored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents of images or of their mirror images.

        Args:
            indices: B positions in the split.
            mirrored: (B,) bool, True = the mirror image; None = none.

        Returns:
            Mean and log-variance, float16 (B, M, C, h, w), and labels (B,) int64.
        """
        side = np.zeros(len(indices), np.int64) if mirrored is None else mirrored.numpy().astype(np.int64)
        return self._rows(np.asarray(indices), side), self.labels[torch.as_tensor(indices)]


class Means(Cache):
    """Batches of held-out images."""

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Means of the posteriors, float32 (B, C, h, w), and labels (B,) int64, at B positions in the split."""
        return self._rows(np.asarray(indices)), self.labels[torch.as_tensor(indices)]


# what NumPy raises for the bytes of a damaged header
BROKEN_HEADERS = (OSError, ValueError, EOFError, SyntaxError, TokenError)


def check(folder: Path, header: dict[str, Any], labels: Tensor | None = None) -> dict[str, Any]:
    """Compare the cache in `folder` with the expected header; returns the header that it has.

    Args:
        folder: the cache.
        header: what the cache must say about itself.
        labels: that it must have, (N,) int64; None = not known.

    Raises:
        UserError: there is no cache, it is damaged, or it is stale or foreign.
    """
    if not (folder / HEADER).is_file():
        raise UserError(f"There is no latent cache in {folder}. {REMEDY}")
    found = read_json(folder / HEADER)
    different = [key for key, value in header.items() if found.get(key) != value]
    if different:
        raise UserError(
            f"The latent cache {folder} was made from something else: {', '.join(different)} differ from those of "
            f"this run. {REMEDY}"
        )
    try:
        arrays = {name: np.lib.format.open_memmap(folder / name, mode="r") for name in (ARRAY, LABELS)}
        whole = arrays[ARRAY].shape == tuple(header["shape"]) and arrays[ARRAY].dtype == TYPES[header["format"]]
        whole &= arrays[LABELS].shape == (header["shape"][0],) and arrays[LABELS].dtype == np.int64
        changed = [name for name, written in found.get("sha256", {}).items() if sha256(folder / name) != written]
    except BROKEN_HEADERS as error:
        raise UserError(f"The latent cache {folder} is damaged ({error}). {REMEDY}") from error
    if not whole:
        raise UserError(
            f"The latent cache {folder} is damaged: its arrays have other shapes or types than its header. {REMEDY}"
        )
    if changed:
        raise UserError(f"The latent cache {folder} is damaged: {changed[0]} is not what was written. {REMEDY}")
    if labels is not None and not np.array_equal(arrays[LABELS], labels.numpy()):
        raise UserError(f"The latent cache {folder} is damaged: its labels are not those of the images. {REMEDY}")
    return found


class Writer:
    """Writes a cache, in a folder that becomes the cache when it is whole; several processes may write at once.

    Args:
        folder: created if missing.
        header: of the cache; its "shape" is that of the array.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder, self.shape = folder, tuple(header["shape"])
        folder.mkdir(parents=True, exist_ok=True)
        self.type = TYPES[header["format"]]
        self.row = int(np.prod(self.shape[1:])) * self.type.itemsize  # bytes
        self.sides = self.shape[:2] if header["format"] == FORMAT else self.shape[:1]
        # an earlier version has begun this cache without checksums, where there is its array and no file for them
        self._sums = None
        if (folder / SUMS).exists() or not (folder / ARRAY).exists():
            self._sums, self._sums_start = _array_file(folder / SUMS, np.dtype("<u4"), self.sides)
        self._file, self.start = _array_file(folder / ARRAY, self.type, self.shape)

    def write(self, first: int, rows: Tensor) -> None:
        """Write rows; they are on disk when this returns.

        Args:
            first: position of the first row.
            rows: (n, ...) of the cache's shape and type.

        Raises:
            ValueError: the rows have another shape or type than the cache.
        """
        values = rows.contiguous().numpy()
        if values.dtype != self.type or values.shape[1:] != self.shape[1:]:
            raise ValueError(f"rows of {values.dtype} {values.shape} do not fit into {self.shape} of {self.type}")
        if self._sums is not None:
            parts = values.reshape(-1, *self.shape[len(self.sides) :])  # one of each image and side
            sums = np.array([zlib.crc32(part) for part in parts], "<u4")
            _write(self._sums, sums, self._sums_start + first * (len(parts) // len(values)) * sums.itemsize)
        _write(self._file, values, self.start + first * self.row)

    def finish(self, labels: Tensor, header: dict) -> None:
        """Write the labels (N,) and, last, the header, which says that all rows are there."""
        np.save(self.folder / LABELS, labels.numpy(), allow_pickle=False)
        if self._sums is not None:
            header = header | {"sha256": {name: sha256(self.folder / name) for name in (LABELS, SUMS)}}
        (self.folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files of the arrays."""
        os.close(self._file)
        if self._sums is not None:
            os.close(self._sums)


def _array_file(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> tuple[int, int]:
    """An open .npy file of this type and shape, which others may write to as well, and where its numbers begin."""
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    head = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    with os.fdopen(os.dup(number), "r+b") as file:
        np.lib.format.write_array_header_1_0(file, head)  # the same bytes from every process
        start = file.tell()
    size = start + kind.itemsize * math.prod(shape)
    if os.fstat(number).st_size < size:
        os.ftruncate(number, size)
    return number, start


def _write(number: int, values: np.ndarray, offset: int) -> None:
    """Plain writes report a full disk; through a memory map it would kill the process."""
    content = memoryview(values).cast("B")
    while content:
        done = os.pwrite(number, content, offset)
        content, offset = content[done:], offset + done
    os.fsync(number)
