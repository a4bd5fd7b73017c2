"""The progress bar, and an estimate of the whole time once the first steps are measured."""

import logging
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

MEASURED_STEPS = 5  # the first steps allocate and compile, so the estimate skips as many before it measures


class TrainingProgress(ProgressBar):
    """Counts optimizer steps, with images/s and loss; a plain log line now and then where no terminal is."""

    def __init__(self, log_every: int = 100):
        super().__init__()
        self.log_every = log_every
        self._bar: Progress | None = None
        self._marks: list[tuple[float, int]] = []  # (time, step)

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self.log_every = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._first_step = self._last_step = trainer.global_step
        self._marks = [(time.monotonic(), trainer.global_step)]
        if not self.log_every:
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} images/s  loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, refresh_per_second=2)
        if not self._bar.console.is_terminal:
            self._bar.disable = True  # a file gets the log lines below instead of a redrawn bar
        self._bar.start()
        self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, rate=0.0, loss=0.0)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        step = trainer.global_step
        if self._bar is None or step == self._last_step:
            return
        self._last_step, done = step, step - self._first_step
        if done % 10 == 0 or done <= 2 * MEASURED_STEPS:
            self._marks = [*self._marks[-5:], (time.monotonic(), step)]
        rate = self._steps_per_second() * module.batch_size
        if done == 2 * MEASURED_STEPS and trainer.max_steps - step > 10 * MEASURED_STEPS:
            minutes = (trainer.max_steps - step) * module.batch_size / rate / 60
            log.info("%.0f images/s: the training takes about %.1f minutes more", rate, minutes)
        if step % 10 == 0 or step == trainer.max_steps:  # reading the loss waits for the device
            loss = outputs["loss"].item() * trainer.accumulate_grad_batches
            self._bar.update(self._task, completed=step, rate=rate, loss=loss)
            if self._bar.disable and step % self.log_every == 0:
                log.info("step %d of %d, %.0f images/s, loss %.4f", step, trainer.max_steps, rate, loss)

    def _steps_per_second(self) -> float:
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
