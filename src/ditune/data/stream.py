"""Training data as a function of (seed, position): a resumed run sees the same batches as one that never stopped."""

import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ditune.data.augment import Augment
from ditune.data.images import ImageDataset
from ditune.data.latents import Latents
from ditune.errors import UserError
from ditune.rng import generator, mix_each
from ditune.stopping import SIGNALS


class ImageStream(Dataset):
    """An endless, shuffled sequence of images; position p belongs to pass p // N over the N images.

    Args:
        dataset: the images, or the cache of their latents.
        seed: the run's seed.
        flip: half of the positions are mirrored left to right. Off for flags, signs and letters.
        augment: changes a share of the images and hides their class; not for latents.
    """

    def __init__(self, dataset: ImageDataset | Latents, seed: int, flip: bool = False, augment: Augment | None = None):
        self.dataset, self.seed, self.flip, self.augment = dataset, seed, flip, augment
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return torch.randperm(len(self.dataset), generator=generator(self.seed, epoch)).numpy()

    def __getstate__(self) -> dict:  # a worker process builds its own cache
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of B positions.

        Returns:
            uint8 images (B, 3, R, R) or float16 latents (B, M, C, h, w); labels (B,); positions (B,).
        """
        indices = self.indices(positions)
        mirrored = torch.from_numpy(mix_each(self.seed, 1, last=positions) % 2 == 1) if self.flip else None
        taken, labels = self.dataset.take(indices, mirrored)
        if self.augment is not None:
            taken, labels = self.augment(taken, labels, positions, self.seed, null_class=self.dataset.num_classes)
        return taken, labels, torch.tensor(positions)

    def indices(self, positions: Sequence[int]) -> list[int]:
        """Numbers in the dataset of the images at these positions."""
        epochs, items = np.divmod(np.asarray(positions, dtype=np.int64), len(self.dataset))
        found = np.empty_like(items)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            found[inside] = self._order(epoch)[items[inside]]
        return found.tolist()

    def blank(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of these positions with its real shapes and types and zeros for content; no file is read."""
        latents, count = isinstance(self.dataset, Latents), len(positions)
        side = None if latents else self.dataset.resolution
        shape, dtype = (self.dataset.shape[2:], torch.float16) if latents else ((3, side, side), torch.uint8)
        return torch.zeros(count, *shape, dtype=dtype), torch.zeros(count, dtype=torch.int64), torch.tensor(positions)


class MicroBatches(Sampler[list[int]]):
    """Positions of this rank's micro-batches, without end.

    Args:
        batch_size: global batch, the positions that one optimizer step covers.
        accumulate: micro-steps per optimizer step.
        rank: of this process.
        world_size: number of processes that share every micro-step.
        first_step: optimizer step to begin with.

    Raises:
        UserError: the global batch cannot be divided evenly.
    """

    def __init__(self, batch_size: int, accumulate: int, rank: int, world_size: int, first_step: int):
        self.size = micro_batch_size(batch_size, accumulate, world_size)
        self.stride, self.offset = self.size * world_size, self.size * rank
        self.start = first_step * batch_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start + self.offset
        while True:
            yield list(range(start, start + self.size))
            start += self.stride


def micro_batch_size(batch_size: int, accumulate: int, world_size: int) -> int:
    """Samples that one process handles at once.

    Args:
        batch_size: global batch.
        accumulate: micro-steps per optimizer step.
        world_size: number of processes.

    Raises:
        UserError: the global batch cannot be divided evenly.
    """
    if batch_size < 1 or batch_size % (accumulate * world_size):
        raise UserError(
            f"batch_size is the global batch, {batch_size}, and cannot be shared by {world_size} processes with "
            f"{accumulate} micro-steps each. Set it to a multiple of {accumulate * world_size}."
        )
    return batch_size // (accumulate * world_size)


def _identity(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return batch


def _leave_signals(worker: int) -> None:
    """Ctrl-C and schedulers signal every process of a run; the trainer wants to finish the step at hand."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def training_loader(stream: ImageStream, batches: MicroBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Loader of (images, labels, positions); images in memory are decoded here, before workers fork and share them.

    Args:
        stream: the training data.
        batches: positions of each micro-batch.
        num_workers: processes that load; 0 = this one.
        pin_memory: for copies to a GPU.
    """
    if stream.dataset.in_memory:
        stream.dataset.load()
    return DataLoader(
        stream,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals,
    )


PictureStream = ImageStream  # its earlier name
