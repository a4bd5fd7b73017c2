"""Stopping on a signal without losing a step."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ditune.distributed import is_spread
from ditune.stopping import Signals, Stopped
from ditune.training.callbacks.checkpoints import Checkpoints
from ditune.training.checkpoint_io import checkpoint_path
from ditune.training.ranks import introduce

log = logging.getLogger(__name__)

AGREE_EVERY = 1.0  # seconds between two agreements of several processes on GPUs, which wait for each other in it


class StopOnSignal(Callback):
    """A signal ends the training after the step at hand, with a checkpoint.

    Before the first step and after the last one it ends what is being done at once; see `ditune.stopping`.

    Args:
        checkpoints: folder of the run's checkpoints.
        signals: of this process.
    """

    def __init__(self, checkpoints: Path, signals: Signals):
        self.checkpoints, self.signals = checkpoints, signals
        self.agreed = False  # whether all processes have stopped after the same step
        self._next = 0  # step after which they ask each other next

    @property
    def stopped_by(self) -> int | None:
        """The signal's number, for the exit code, or None."""
        return self.signals.number

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            introduce(self.signals)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.gentle = True
        self._last, self._next = (time.monotonic(), trainer.global_step), trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step >= trainer.max_steps:
            return
        if self._is_stop(trainer):
            log.warning("stopping at step %d; resume=auto in the same run folder goes on", trainer.global_step)
            for callback in trainer.callbacks:
                if isinstance(callback, Checkpoints):
                    callback.save(trainer)  # one that is due at this step is that of the signal too
            trainer.should_stop = self.agreed = True

    def _is_stop(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return self.signals.number is not None
        return trainer.global_step >= self._next and self._agree(trainer)

    def _agree(self, trainer: pl.Trainer) -> bool:
        """Whether a signal has come to any process, the same for all; and at which step they ask each other next.

        On CPUs that is every step. GPUs would be waited for, so there it is once in a second: the step follows from
        the slowest process's pace, the same for all, and the distance at most doubles each time.
        """
        (since, first), now, step = self._last, time.monotonic(), trainer.global_step
        device, passed = trainer.strategy.root_device, max(step - first, 1)
        mine = torch.tensor([self.signals.number or 0, (now - since) / passed], dtype=torch.float32)
        number, pace = trainer.strategy.reduce(mine.to(device), reduce_op="max").tolist()
        if number:
            self.signals.note(int(number))
        self._last = now, step
        steps = 1 if device.type == "cpu" else min(int(AGREE_EVERY / max(pace, 1e-6)), 2 * passed)
        self._next = step + max(steps, 1)
        return number > 0

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.gentle = False

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.signals.gentle = False

    @contextmanager
    def at_once(self, trainer: pl.Trainer, unchanged: bool) -> Iterator[None]:
        """After the last step a signal ends what is done in the block, in all processes.

        Args:
            trainer: after its fit.
            unchanged: whether the network still has the weights of the last step, which are then saved.

        Raises:
            Stopped: a signal has come.
        """
        try:
            if self.signals.number is not None:  # while the last sheet was generated
                raise Stopped(self.signals.number)
            yield
        except Stopped:
            path = checkpoint_path(self.checkpoints, trainer.global_step)
            apart = is_spread(trainer.lightning_module.network)  # then a checkpoint is a work of all processes
            if unchanged and not apart and not path.exists():  # the first process alone writes, and waits for no other
                trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), path)
            raise
