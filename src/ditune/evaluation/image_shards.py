"""Generated images on disk, shard by shard: several processes share the work, and any of them can be stopped."""

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditune.distributed import rank, world_size
from ditune.errors import UserError
from ditune.evaluation.image_arrays import ArrayImages
from ditune.files.atomic import atomic, read_json, write_json
from ditune.progress import meter

__all__ = ["ArrayImages", "ImageShards", "weights_hash"]

WAIT = 0.5  # seconds between two looks for the shards of the other processes


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class ImageShards:
    """uint8 images 0..n-1 as files of `size` images; an image set for the metrics.

    Args:
        folder: of the files.
        header: what the images are of; a folder with another header is refused.
        labels: classes (n,) int64.
        size: images of a shard.

    Raises:
        UserError: the folder holds other images.
    """

    def __init__(self, folder: Path, header: dict[str, Any], labels: Tensor, size: int) -> None:
        self.folder, self.labels, self.size = folder, labels, size
        self.fingerprint = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
        path = folder / "header.json"
        if path.is_file() and read_json(path) != json.loads(json.dumps(header)):
            raise UserError(
                f"{folder} holds images that were generated with other settings. Delete it, or choose another folder."
            )
        if rank() == 0:
            write_json(path, header)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, R, R) and labels (B,); neighbours are read from one shard."""
        shards: dict[int, np.ndarray] = {}
        images = []
        for i in indices:
            shard = i // self.size
            if shard not in shards:
                shards[shard] = np.load(self._path(shard), allow_pickle=False)
            images.append(torch.from_numpy(shards[shard][i % self.size]))
        return torch.stack(images), self.labels[indices]

    def fill(self, generate: Callable[[list[int]], Tensor]) -> None:
        """Generate this process's share of the missing images, then wait for the other processes.

        Args:
            generate: numbers of images -> uint8 (B, 3, R, R).
        """
        count = -(-len(self) // self.size)
        mine = [shard for shard in range(count) if shard % world_size() == rank() and not self._path(shard).exists()]
        rows = {shard: list(range(shard * self.size, min((shard + 1) * self.size, len(self)))) for shard in mine}
        with meter("generating images", sum(map(len, rows.values()))) as progress:
            for shard, indices in rows.items():
                with atomic(self._path(shard)) as temporary, temporary.open("wb") as file:
                    np.save(file, generate(indices).numpy())
                progress.advance(len(indices))
        self._wait(count)

    def _wait(self, count: int) -> None:
        """Wait for the shards of all processes."""
        with meter("waiting for the other processes", count, "shards") as progress:
            while (there := sum(self._path(shard).exists() for shard in range(count))) < count:
                progress.update(there)
                time.sleep(WAIT)

    def save_npz(self, path: Path) -> None:
        """The file that ADM's evaluator reads: arr_0 uint8 (n, R, R, 3), arr_1 labels; written shard by shard."""
        first = self.__getitems__([0])[0]
        shape = (len(self), *first.shape[2:], 3)
        with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(self), self.size):
                    rows = list(range(start, min(start + self.size, len(self))))
                    file.write(self.__getitems__(rows)[0].permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.save(file, self.labels.numpy())

    def delete(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.npy"
