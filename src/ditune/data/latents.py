"""Latents of a split, encoded once: a folder with one memory-mapped array, its labels, and a header of its origin.

latents.npy  float16 (N, 2, M, C, h, w): picture, plain or mirrored, mean and log-variance (M = 1: mean only)
labels.npy   int64 (N,)
header.json  the pictures (hash of manifest), transform and autoencoder that it was made from
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditune.data.images import Pictures
from ditune.errors import UserError
from ditune.files.atomic import read_json, sha256

FORMAT = "ditune-latents-1"
HEADER, ARRAY, LABELS = "header.json", "latents.npy", "labels.npy"
REMEDY = "Run `python src/prepare.py` with the same data=, autoencoder= and data.resolution= to make it anew."


def expected_header(pictures: Pictures, manifest: Path, autoencoder: str, shape: Sequence[int], moments: int) -> dict:
    """What the cache of these pictures under this autoencoder (its latent_fingerprint) must say about itself."""
    return {
        "format": FORMAT,
        "manifest": sha256(manifest),
        "split": pictures.split,
        "pictures": pictures.fingerprint,
        "transform": f"centre crop of ADM to {pictures.resolution} pixels, RGB",
        "autoencoder": autoencoder,
        "shape": [len(pictures), 2, moments, *shape],
    }


class Latents:
    """Batches from a cache; stands where `Pictures` stands for the stream of a training.

    Raises UserError when the cache is missing, damaged, or was made from something else than `header` says.
    """

    in_memory = False

    def __init__(self, folder: Path, header: dict) -> None:
        found = check(folder, header)
        self.folder, self.shape = folder, tuple(found["shape"])
        self.labels = torch.from_numpy(np.load(folder / LABELS, allow_pickle=False))  # (N,)
        self._array: np.memmap | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, indices: Sequence[int], mirrored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float16 (B, M, C, h, w), of pictures or their mirror images, and labels (B,)."""
        if self._array is None:  # every process maps the file for itself
            self._array = np.lib.format.open_memmap(self.folder / ARRAY, mode="r")
        side = np.zeros(len(indices), np.int64) if mirrored is None else mirrored.numpy().astype(np.int64)
        return torch.from_numpy(self._array[np.asarray(indices), side]), self.labels[torch.as_tensor(indices)]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_array": None}


def check(folder: Path, header: dict) -> dict:
    """The header of the cache in `folder`, after comparing it with the expected one.

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
    """Rows of a cache that several processes write at once, in a folder that becomes the cache when it is whole."""

    def __init__(self, folder: Path, header: dict) -> None:
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
        """Rows first, first + 1, ..., float16 (n, 2, M, C, h, w), on disk when this returns."""
        if rows.dtype != torch.float16 or tuple(rows.shape[1:]) != self.shape[1:]:
            raise ValueError(f"rows of {rows.dtype} {tuple(rows.shape)} do not fit into {self.shape}")
        content, offset = memoryview(rows.contiguous().numpy()).cast("B"), self.start + first * self.row
        while content:
            # plain writes report a full disk; through a memory map it would kill the process
            done = os.pwrite(self._file, content, offset)
            content, offset = content[done:], offset + done
        os.fsync(self._file)

    def finish(self, labels: Tensor, header: dict) -> None:
        """Labels and, last, the header, which says that all rows are there."""
        np.save(self.folder / LABELS, labels.numpy(), allow_pickle=False)
        (self.folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        os.close(self._file)
