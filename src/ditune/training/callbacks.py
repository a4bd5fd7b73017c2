"""What happens around the steps: sample sheets, and stopping on a signal without losing a step."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torchvision.transforms.functional import pil_to_tensor

from ditune.data import Pictures
from ditune.drawing import Drawer, example_plan
from ditune.progress import meter
from ditune.visuals import grid, side_by_side

from .outlook import Outlook

log = logging.getLogger(__name__)


class StepClock(Callback):
    """Seconds spent in training steps; waiting for data, sheets and checkpoints do not count."""

    seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._start


class DrawSamples(Callback):
    """The same noise and labels at step 0, every `every_n_steps` and at the end: samples/step_<k>.png, and the loggers.

    At the end before_after.png has the first sheet, the last one and training pictures of the same classes.

    Args:
        drawer: how to draw.
        pictures: the training set, whose classes are drawn.
        n: number of pictures; 0 = no sheets.
        seed: of noise and classes.
        folder: of the sheets.
        every_n_steps: steps between two sheets; 0 = only the first and the last.
        outlook: is given the time that an image takes.
        columns: pictures in a row.
    """

    def __init__(
        self,
        drawer: Drawer,
        pictures: Pictures,
        n: int,
        seed: int,
        folder: Path,
        every_n_steps: int,
        outlook: Outlook,
        columns: int = 8,
    ):
        self.drawer, self.pictures, self.seed, self.folder = drawer, pictures, seed, folder
        self.every_n_steps, self.outlook, self.columns = every_n_steps, outlook, columns
        self.rows = example_plan(len(pictures), seed, n)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._draw(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step < trainer.max_steps:
            self._draw(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step < trainer.max_steps or not trainer.is_global_zero or not self.rows:
            return
        self._draw(trainer, module)
        examples, _ = self.pictures.__getitems__(self.rows)
        panels = {"before": self._sheet(0), "after": self._sheet(trainer.global_step)}
        panels = {name: Image.open(path) for name, path in panels.items() if path.exists()}
        panels["training pictures of the same classes"] = grid(examples, self.columns)
        side_by_side(panels).save(self.folder / "before_after.png")

    def _sheet(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.png"

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        path = self._sheet(trainer.global_step)
        if not trainer.is_global_zero or path.exists() or not self.rows:
            return
        module.network.eval()
        labels, start = self.pictures.labels[self.rows], time.perf_counter()
        with module.ema.applied(), meter(f"sample sheet of step {trainer.global_step}", len(labels)) as progress:
            pictures = self.drawer.draw(module.network, labels, self.seed, on_batch=progress.update)
        self.outlook.image_seconds = (time.perf_counter() - start) / len(labels)
        module.network.train()
        sheet = grid(pictures, self.columns)
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [sheet], caption=[f"step {trainer.global_step}"])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", pil_to_tensor(sheet), trainer.global_step)


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


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.ckpt"


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process has held on the device, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows, where nothing else of this module would fail

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
