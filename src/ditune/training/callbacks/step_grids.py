"""Step grids: the same noise in few and many steps, and how strongly the output depends on the step size."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ditune.data import ImageDataset
from ditune.errors import UserError
from ditune.generation.generator import ImageGenerator, example_plan
from ditune.generation.grids import before_after_sheet
from ditune.rng import StepRandom
from ditune.samplers import ShortcutSampler, check
from ditune.stopping import Interrupted
from ditune.training.callbacks.samples import generates, interruptible_alone, is_there, save
from ditune.training.loggers.images import log_image


class StepGrids(Callback):
    """samples/strips_<k>.png: one row for each number of steps, all of the same noise and classes.

    With it `samples/step_dependence` is logged: how far the velocities for one step and for the finest one lie apart
    at pure noise, relative to the latter. A network that ignores the step size has 0.

    Args:
        generator: how images are generated.
        images: the training set, whose classes are generated.
        n: images in a row; 0 = no grids.
        steps: numbers of steps; those that the network was not trained for are left out.
        seed: of noise and classes.
        folder: of the grids.
        every_n_steps: training steps between two grids; 0 = only at the end.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        images: ImageDataset,
        n: int,
        steps: Sequence[int],
        seed: int,
        folder: Path,
        every_n_steps: int,
    ):
        self.images, self.seed, self.folder, self.every_n_steps = images, seed, folder, every_n_steps
        self.generator = replace(generator, sampler=ShortcutSampler(), batch_size=max(n, 1))
        self.rows = example_plan(len(images), seed, n)
        self.steps = [count for count in steps if self._known(count)]

    def _known(self, count: int) -> bool:
        try:
            check(self.generator.sampler, self.generator.process, count)
        except UserError:
            return False
        return True

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # a signal may have left no time for the grid of the step that it goes on from
        if trainer.global_step and not is_there(self._path(trainer), trainer, module):
            self._draw_if_due(trainer, module)

    def make_up(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The grid that a kill after the last step has left no time for."""
        self.on_train_start(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (batch_idx + 1) % trainer.accumulate_grad_batches:
            self._draw_if_due(trainer, module)

    def _draw_if_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        due = step == trainer.max_steps or (self.every_n_steps and step % self.every_n_steps == 0)
        if due:
            module.settle()
        if due and self.rows and generates(trainer, module):
            with suppress(Interrupted), interruptible_alone(module):
                self._draw(trainer, module)

    def _path(self, trainer: pl.Trainer) -> Path:
        return self.folder / f"strips_{trainer.global_step:07d}.png"

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        module.network.eval()
        try:
            with module.ema.applied():
                rows = self._grid(module)
                dependence = self.dependence(module)
        finally:
            module.network.train()
        if not trainer.is_global_zero:
            return
        save(rows, self._path(trainer))
        for logger in trainer.loggers:
            logger.log_metrics({"samples/step_dependence": dependence}, step=step)
        log_image(trainer.loggers, "strips", rows, step)

    def _grid(self, module: pl.LightningModule):
        labels = self.images.labels[self.rows]
        generators = {f"steps: {count}": replace(self.generator, steps=count) for count in self.steps}
        return before_after_sheet(
            {name: d.generate(module.network, labels, self.seed) for name, d in generators.items()}
        )

    @torch.inference_mode()
    def dependence(self, module: pl.LightningModule) -> float:
        """rms of u(x, 1, d = 1) - u(x, 1, d = 0) over the rms of the latter, at pure noise x."""
        shape, process = self.generator.autoencoder.latent_shape(self.generator.resolution), self.generator.process
        x = StepRandom(self.seed, 0, range(len(self.rows)), module.device).normal("dependence", shape)
        y, one = self.images.labels[self.rows].to(module.device), torch.ones(len(x), device=module.device)
        with torch.autocast(module.device.type, torch.bfloat16, enabled=self.generator.bf16):
            whole, fine = (process.velocity(module.network, x, one, y, d) for d in (one, torch.zeros_like(one)))
        return ((whole - fine).square().mean() / fine.square().mean().clamp(min=1e-12)).sqrt().item()
