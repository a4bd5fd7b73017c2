"""The latents of a split, encoded once: a folder with a memory-mapped array, labels, and a header of their origin.

latents.npy  of images to train on, float16 (N, 2, M, C, h, w): image, plain or mirrored, mean and log-variance (M = 1:
             mean only); of held-out images float32 (N, C, h, w): the means, as they are when nothing is cached
labels.npy   int64 (N,)
header.json  the images (hash of manifest), transform and autoencoder that it was made from
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditune.data.images import ImageDataset
from ditune.errors import UserError
from ditune.files.atomic import read_json, sha256

FORMAT, MEANS = "ditune-latents-1", "ditune-means-1"
TYPES = {FORMAT: np.dtype("<f2"), MEANS: np.dtype("<f4")}
HEADER, ARRAY, LABELS = "header.json", "latents.npy", "labels.npy"
REMEDY = "Run `python src/prepare.py` with the same data=, autoencoder= and data.resolution= to make it anew."


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
        "manifest": sha256(manifest),
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

    Raises:
        UserError: the cache is missing, damaged, or has another header.
    """

    in_memory = False

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        found = check(folder, header)
        self.folder, self.shape = folder, tuple(found["shape"])
        self.labels = torch.from_numpy(np.load(folder / LABELS, allow_pickle=False))  # (N,)
        self._array: np.memmap | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def array(self) -> np.memmap:
        """All rows, mapped from the file; every process maps it for itself."""
        if self._array is None:
            self._array = np.lib.format.open_memmap(self.folder / ARRAY, mode="r")
        return self._array

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_array": None}


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
        return torch.from_numpy(self.array[np.asarray(indices), side]), self.labels[torch.as_tensor(indices)]


class Means(Cache):
    """Batches of held-out images."""

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Means of the posteriors, float32 (B, C, h, w), and labels (B,) int64, at B positions in the split."""
        return torch.from_numpy(self.array[np.asarray(indices)]), self.labels[torch.as_tensor(indices)]


def check(folder: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Compare the cache in `folder` with the expected header; returns the header that it has.

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
        whole = np.lib.format.open_memmap(folder / ARRAY, mode="r").shape == tuple(header["shape"])
        whole &= np.load(folder / LABELS, allow_pickle=False).shape == (header["shape"][0],)
    except (OSError, ValueError) as error:
        raise UserError(f"The latent cache {folder} is damaged ({error}). {REMEDY}") from error
    if not whole:
        raise UserError(f"The latent cache {folder} is damaged: its arrays have other shapes than its header. {REMEDY}")
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
        head = {"descr": np.lib.format.dtype_to_descr(self.type), "fortran_order": False, "shape": self.shape}
        self._file = os.open(folder / ARRAY, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(os.dup(self._file), "r+b") as file:
            np.lib.format.write_array_header_1_0(file, head)  # the same bytes from every process
            self.start = file.tell()
        if os.fstat(self._file).st_size < self.start + self.row * self.shape[0]:
            os.ftruncate(self._file, self.start + self.row * self.shape[0])

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
        content, offset = memoryview(values).cast("B"), self.start + first * self.row
        while content:
            # plain writes report a full disk; through a memory map it would kill the process
            done = os.pwrite(self._file, content, offset)
            content, offset = content[done:], offset + done
        os.fsync(self._file)

    def finish(self, labels: Tensor, header: dict) -> None:
        """Write the labels (N,) and, last, the header, which says that all rows are there."""
        np.save(self.folder / LABELS, labels.numpy(), allow_pickle=False)
        (self.folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the file of the array."""
        os.close(self._file)
