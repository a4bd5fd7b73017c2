"""The progress of a training, and an estimate of the whole time once the first steps are measured."""

import time
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar

from ditune.progress import Meter, meter
from ditune.training.outlook import Outlook

MEASURED_STEPS = 5  # the first steps allocate and compile, so the estimate skips as many before it measures
SHOWN_EVERY = 0.1  # seconds between two notes at the least: nobody reads more, and a step may take 1 ms
SYNCHRONISED = 10  # steps between two readings of the loss, which wait for a GPU; where a log is kept, its steps


class TrainingProgress(ProgressBar):
    """Counts optimizer steps, with images/s and loss.

    Args:
        outlook: what comes besides the steps.
    """

    def __init__(self, outlook: Outlook):
        super().__init__()
        self.outlook, self.first_rank = outlook, True
        self._open = ExitStack()
        self._meter: Meter | None = None
        self._marks: list[tuple[float, int]] = []  # (time, step)
        self._loss = float("nan")
        self._shown = 0.0  # time of the last note

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self.first_rank = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._first_step = self._last_step = trainer.global_step
        if self.first_rank:
            self._meter = self._open.enter_context(
                meter("training", trainer.max_steps, "steps", done=trainer.global_step)
            )

    def on_train_batch_start(self, *_: Any) -> None:
        if not self._marks:  # sheets before the first step are over
            self._marks = [(time.monotonic(), self._first_step)]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        step = trainer.global_step
        if self._meter is None or step == self._last_step:
            return
        self._last_step, done, now = step, step - self._first_step, time.monotonic()
        first, last = done <= 2 * MEASURED_STEPS, step == trainer.max_steps
        if done % 10 == 0 or first:
            self._marks = [*self._marks[-5:], (now, step)]
        shown = first or last or now - self._shown >= SHOWN_EVERY
        read_every = trainer.log_every_n_steps or SYNCHRONISED
        if shown if module.device.type == "cpu" else last or step % read_every == 0:
            self._loss = outputs["loss"].item() * trainer.accumulate_grad_batches
        if not shown:
            return
        self._shown, steps_per_second = now, self._steps_per_second()
        images_per_second = steps_per_second * module.batch_size
        if done == 2 * MEASURED_STEPS:
            self.outlook.say(step, images_per_second)
        note = f"loss {self._loss:.4f}, {images_per_second:.0f} images/s"
        self._meter.update(step, note, pace=steps_per_second)

    def _steps_per_second(self) -> float:
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._open.close()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._open.close()
