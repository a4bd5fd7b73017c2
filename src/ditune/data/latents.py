"""The latents of a split, encoded once: a folder with a memory-mapped array, labels, and a header of their origin.

latents.npy  float16 (N, 2, M, C, h, w): image, plain or mirrored, mean and log-variance (M = 1: mean only)
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

FORMAT = "ditune-latents-1"
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


class Latents:
    """Batches from a cache; the stream of a training reads it as it reads an `ImageDataset`.

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

    def take(self, indices: Sequence[int], mirrored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents of images or of their mirror images.

        Args:
            indices: B positions in the split.
            mirrored: (B,) bool, True = the mirror image; None = none.

        Returns:
            Mean and log-variance, float16 (B, M, C, h, w), and labels (B,) int64.
        """
        if self._array is None:  # every process maps the file for itself
            self._array = np.lib.format.open_memmap(self.folder / ARRAY, mode="r")
        side = np.zeros(len(indices), np.int64) if mirrored is None else mirrored.numpy().astype(np.int64)
        return torch.from_numpy(self._array[np.asarray(indices), side]), self.labels[torch.as_tensor(indices)]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_array": None}


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
        header: of the cache; its "shape" is (N, 2, M, C, h, w).
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder, self.shape = folder, tuple(header["shape"])
        folder.mkdir(parents=True, exist_ok=True)
        self.row = int(np.prod(self.shape[1:])) * 2  # bytes
        head = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f2")), "fortran_order": False, "shape": self.shape}
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
            rows: float16 (n, 2, M, C, h, w).

        Raises:
            ValueError: the rows have another shape or type than the cache.
        """
        if rows.dtype != torch.float16 or tuple(rows.shape[1:]) != self.shape[1:]:
            raise ValueError(f"rows of {rows.dtype} {tuple(rows.shape)} do not fit into {self.shape}")
        content, offset = memoryview(rows.contiguous().numpy()).cast("B"), self.start + first * self.row
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
