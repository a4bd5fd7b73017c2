"""Pairs of noise and the latent that a teacher generates from it, kept in a folder by `src/sample.py pairs=`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.files.atomic import read_json, sha256
from ditune.rng import generator

FORMAT = "ditune-pairs-1"
HEADER, LABELS = "pairs.json", "labels.npy"


def shard_file(folder: Path, i: int) -> Path:
    """File of shard i, float32 (size, C, h, w)."""
    return folder / f"{i:06d}.npy"


class Pairs:
    """Pairs (z, x): x is in the files, z is a function of the seed and the number of the pair.

    Args:
        folder: of the pairs.

    Raises:
        UserError: the folder holds none, or not all of them.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser()
        path = self.folder / HEADER
        if not path.is_file():
            raise UserError(
                f"objective.pairs is {folder}, and no pairs are there. Run src/sample.py with pairs={folder}."
            )
        self.header: dict[str, Any] = read_json(path)
        if self.header.get("format") != FORMAT:
            raise UserError(f"objective.pairs is {folder}, whose {HEADER} is of another release. Make the pairs again.")
        count = -(-self.header["n"] // self.header["shard"])
        files = [shard_file(self.folder, i) for i in range(count)]
        missing = sum(not file.is_file() for file in files)
        if missing:
            raise UserError(
                f"objective.pairs is {folder}, which lacks {missing} of its {count} files. Start the same command "
                "again: it makes what is missing."
            )
        self.shards = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        self.labels = torch.from_numpy(np.load(self.folder / LABELS, allow_pickle=False))  # (n,) int64
        self.sha256 = sha256(path)  # the header says all that decides the latents

    def __len__(self) -> int:
        return self.header["n"]

    def latents(self, rows: Sequence[int]) -> Tensor:  # (N, C, h, w) float32
        """x of pairs, by their numbers."""
        size = self.header["shard"]
        return torch.from_numpy(np.stack([self.shards[i // size][i % size] for i in rows]))

    def noise(self, rows: Sequence[int]) -> Tensor:  # (N, C, h, w) float32
        """z of pairs: what the generator began with, see `ditune.samplers.NoiseStream`."""
        seed, shape = self.header["seed"], self.header["shape"]
        return torch.stack([torch.randn(shape, generator=generator(seed, int(i))) for i in rows])
