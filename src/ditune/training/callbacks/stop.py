"""Stopping on a signal without losing a step."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ditune.training.checkpoint_io import checkpoint_path

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """SIGINT or SIGTERM ends the training after the step at hand, with a checkpoint; a second SIGINT ends it at once.

    `stopped_by` is the signal's number, for the exit code, or None.
    """

    CHECK_EVERY = 10  # steps between two agreements of several processes, which wait for each other in it

    def __init__(self, checkpoints: Path):
        self.checkpoints = checkpoints
        self.stopped_by: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._previous = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.should_stop:
            return
        stop = self.stopped_by is not None
        if trainer.world_size > 1:
            if trainer.global_step % self.CHECK_EVERY:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop and trainer.global_step < trainer.max_steps:
            self.stopped_by = self.stopped_by or signal.SIGTERM  # of another rank
            log.warning("stopping at step %d; resume=auto in the same run folder goes on", trainer.global_step)
            trainer.save_checkpoint(checkpoint_path(self.checkpoints, trainer.global_step))
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """After the last step there is no step to wait for: a signal interrupts what is done inside of the block."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            self.stopped_by = number
            raise KeyboardInterrupt

        previous = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)
