"""Checkpoints every so many steps and at the end, with the log's lines before them on the disk."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from ditune.training.checkpoint_io import CONTINUE, checkpoint_path
from ditune.training.loggers.metrics_csv import MetricsCsv


class Checkpoints(Checkpoint):
    """Saves whole steps; which of the files stay is decided by `AtomicCheckpointIO`.

    Lightning's own ModelCheckpoint would never remove the checkpoint that a run went on from.

    Args:
        folder: of the checkpoints.
        every_n_steps: steps between two of them; 0 = none.
    """

    def __init__(self, folder: Path, every_n_steps: int):
        self.folder, self.every_n_steps = folder, every_n_steps
        self._saved: int | None = None  # step of the last one

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every_n_steps or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        last = step == trainer.max_steps
        if (step % self.every_n_steps == 0 or last) and step != self._saved:
            # what was trained is saved next, in a smaller file for which there may be room
            self.save(trainer, CONTINUE if last else None)

    def save(self, trainer: pl.Trainer, storage_options: Any = None) -> None:
        """Save the step at hand."""
        self._saved = trainer.global_step
        trainer.save_checkpoint(checkpoint_path(self.folder, self._saved), storage_options=storage_options)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called in all processes before any checkpoint is written.

        A run that is killed after it goes on behind the lines before it, so they must be there. Lightning logs the
        line of the step at hand later.
        """
        checkpoint["world_size"] = trainer.world_size
        step, logged = trainer.global_step, trainer.logged_metrics
        due = trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                if due and logged:
                    logger.log_metrics(logged, step=step - 1)
                logger.write()
