"""The order of a training's images, handed to the trainer from the step that it has been restored to."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ditune.data.stream import ImageStream, MicroBatches, training_loader


class StreamData(pl.LightningDataModule):
    """A loader that begins at the step that the trainer has been restored to.

    Args:
        stream: positions to images or latents.
        batch_size: global.
        num_workers: processes that load; 0 = the training process.
    """

    def __init__(self, stream: ImageStream, batch_size: int, num_workers: int):
        super().__init__()
        self.stream, self.batch_size, self.num_workers = stream, batch_size, num_workers

    def train_dataloader(self) -> Any:
        """Called by the trainer once it knows its step."""
        trainer = self.trainer
        batches = MicroBatches(
            self.batch_size,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            trainer.global_step,
        )
        return training_loader(self.stream, batches, self.num_workers, trainer.strategy.root_device.type == "cuda")

    def transfer_batch_to_device(self, batch: tuple[Tensor, ...], device: torch.device, _: int) -> tuple[Tensor, ...]:
        """Positions stay on the CPU: random numbers are looked up by them, and to read them back is to wait."""
        images, labels, positions = batch
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True), positions
