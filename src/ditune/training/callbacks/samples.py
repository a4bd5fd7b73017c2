"""Sample grids: the same noise and classes before, during and after a training."""

import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image, UnidentifiedImageError
from pytorch_lightning.callbacks import Callback

from ditune.data import ImageDataset
from ditune.distributed import is_spread
from ditune.files.atomic import atomic, set_aside
from ditune.files.spared import spared
from ditune.generation.generator import ImageGenerator, example_plan
from ditune.generation.grids import grid, side_by_side
from ditune.progress import meter
from ditune.stopping import Interrupted, interruptible
from ditune.training.loggers.images import log_image
from ditune.training.outlook import Outlook

AT_THE_END = "before_after.png"


class SampleGrids(Callback):
    """The same noise and labels at step 0, every `every_n_steps` and at the end: samples/step_<k>.png, and the loggers.

    At the end before_after.png has the first sheet, the last one and training images of the same classes.

    Args:
        generator: how images are generated.
        images: the training set, whose classes are generated.
        n: number of images; 0 = no sheets.
        seed: of noise and classes.
        folder: of the sheets.
        every_n_steps: steps between two sheets; 0 = only the first and the last.
        outlook: gets the time that an image takes.
        columns: images in a row.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        images: ImageDataset,
        n: int,
        seed: int,
        folder: Path,
        every_n_steps: int,
        outlook: Outlook,
        columns: int = 8,
    ):
        self.generator, self.images, self.seed, self.folder = generator, images, seed, folder
        self.every_n_steps, self.outlook, self.columns = every_n_steps, outlook, columns
        self.rows = example_plan(len(images), seed, n)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._draw_if_due(trainer, module)  # at the step that it goes on from, too: a signal may have left no time

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self._draw_if_due(trainer, module)

    def _draw_if_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step, every = trainer.global_step, self.every_n_steps
        if step == 0 or (every and step % every == 0 and step < trainer.max_steps):
            module.settle()
            with suppress(Interrupted), interruptible_alone(module):
                self._draw(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step < trainer.max_steps or not self.rows:
            return
        try:
            with interruptible_alone(module):
                self._draw(trainer, module)
        except Interrupted:
            return
        if not trainer.is_global_zero:
            return
        examples, _ = self.images.__getitems__(self.rows)
        panels = {"before": self._sheet(0), "after": self._sheet(trainer.global_step)}
        panels = {name: image for name, path in panels.items() if (image := opened(path)) is not None}
        panels["training images of the same classes"] = grid(examples, self.columns)
        save(side_by_side(panels), self.folder / AT_THE_END)

    def make_up(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What a kill after the last step has left no time for: Lightning calls nothing where no step is left."""
        if not (self.folder / AT_THE_END).exists():
            self.on_train_end(trainer, module)

    def _sheet(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.png"

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        path = self._sheet(trainer.global_step)
        if not self.rows or not generates(trainer, module) or is_there(path, trainer, module):
            return
        module.network.eval()
        labels, start = self.images.labels[self.rows], time.perf_counter()
        try:
            with module.ema.applied(), meter(f"sample sheet of step {trainer.global_step}", len(labels)) as progress:
                images = self.generator.generate(module.network, labels, self.seed, on_batch=progress.update)
        finally:
            module.network.train()
        self.outlook.image_seconds = (time.perf_counter() - start) / len(labels)
        if not trainer.is_global_zero:
            return
        sheet = grid(images, self.columns)
        save(sheet, path)
        log_image(trainer.loggers, "samples", sheet, trainer.global_step)


def generates(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether this process generates a sheet: the first one, or all of them together where the network is spread."""
    return trainer.is_global_zero or is_spread(module.network)


def is_there(path: Path, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether the first process has a file; all that generate together decide by it."""
    return trainer.strategy.broadcast(path.exists()) if is_spread(module.network) else path.exists()


def interruptible_alone(module: pl.LightningModule) -> AbstractContextManager[None]:
    """A signal gives up what is done inside, unless the other processes would wait for this one's share of it."""
    return nullcontext() if is_spread(module.network) else interruptible()


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG; a training goes on without it."""
    with spared("sample grids"), atomic(path) as temporary:
        image.save(temporary, "PNG")


def opened(path: Path) -> Image.Image | None:
    """An image of an earlier start, None where there is none; a damaged one is set aside."""
    if not path.is_file():
        return None
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # Pillow's, for damaged files
        set_aside(path, str(error))
        return None
    return image
