"""Generated images on disk, shard by shard: several processes share the work, and any of them can be stopped."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditune.distributed import rank
from ditune.errors import UserError
from ditune.evaluation.image_arrays import ArrayImages
from ditune.evaluation.shared_files import Ranks, SharedFiles
from ditune.files.atomic import atomic, read_json, write_json
from ditune.metrics import MetricSuite
from ditune.metrics.features import BATCHES, Part
from ditune.progress import meter

__all__ = ["ArrayImages", "ImageShards", "weights_hash"]


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
        ranks: that share the work; None = there is only this process.

    Raises:
        UserError: the folder holds other images.
    """

    def __init__(
        self, folder: Path, header: dict[str, Any], labels: Tensor, size: int, ranks: Ranks | None = None
    ) -> None:
        self.folder, self.labels, self.size = folder, labels, size
        self.files = SharedFiles(folder, -(-len(labels) // size), ranks)
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
                shards[shard] = self.files.read(shard)
            images.append(torch.from_numpy(shards[shard][i % self.size]))
        return torch.stack(images), self.labels[indices]

    def fill(self, generate: Callable[[list[int]], Tensor]) -> None:
        """Generate this process's share of the images that are missing; `wait` waits for the other shares.

        Args:
            generate: numbers of images -> uint8 (B, 3, R, R).
        """
        rows = {shard: self._rows(shard) for shard in self.files.missing()}
        with meter("generating images", sum(map(len, rows.values()))) as progress:
            for shard, indices in rows.items():
                self.files.make(shard, lambda indices=indices: generate(indices).numpy())
                progress.advance(len(indices))

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Wait until images are there.

        Args:
            indices: their numbers; None = all.

        Raises:
            UserError: a process has ended that should generate some of them.
        """
        self.files.wait(None if indices is None else sorted({i // self.size for i in indices}))

    def features(self, suite: MetricSuite) -> SharedFiles:
        """Compute this process's share of the extractor's outputs, once the images for it are there.

        Each file has whole batches of the suite, so that every image is in the same batch however many processes there
        are.
        """
        size = BATCHES * suite.batch_size
        shared = SharedFiles(self.folder / "features", -(-len(self) // size), self.files.ranks)
        parts = {i: range(i * size, min((i + 1) * size, len(self))) for i in shared.missing()}
        with meter("extracting features", sum(map(len, parts.values()))) as progress:
            for i, rows in parts.items():
                self.wait(rows)
                shared.make(i, lambda rows=rows: suite.features(Part(self, rows), progress.advance).numpy())
        return shared

    def save_npz(self, path: Path) -> None:
        """The file that ADM's evaluator reads: arr_0 uint8 (n, R, R, 3), arr_1 labels; written shard by shard."""
        first = self.__getitems__([0])[0]
        shape = (len(self), *first.shape[2:], 3)
        with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                with meter(f"writing {path.name}", len(self)) as progress:
                    for shard in range(self.files.count):
                        images = self.__getitems__(self._rows(shard))[0]
                        file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                        progress.advance(len(images))
            with archive.open("arr_1.npy", "w") as file:
                np.save(file, self.labels.numpy())

    def delete(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _rows(self, shard: int) -> list[int]:
        return list(range(shard * self.size, min((shard + 1) * self.size, len(self))))
