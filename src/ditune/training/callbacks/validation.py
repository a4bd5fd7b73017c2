"""What is measured while a training runs: the loss on held-out images, and a small evaluation, as val/<name>."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ditune.evaluation.denoising_loss import HeldOutLoss
from ditune.generation.generator import ImageGenerator
from ditune.metrics import MetricSuite
from ditune.metrics.names import family
from ditune.progress import meter
from ditune.stopping import Interrupted
from ditune.training.best_weights import BestWeights
from ditune.training.callbacks.samples import interruptible_alone

log = logging.getLogger(__name__)

PREFIX = "val/"  # of the names in metrics.csv, W&B and TensorBoard
LOSS = "loss"  # the name of the loss on held-out images


class Measure(Protocol):
    """Numbers of the network as it is, by name; those of the first process count, others may get {}.

    All processes call it at the same step. It moves no global random number and changes no weight.
    """

    every_n_steps: int

    def __call__(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]: ...


def evenly_spread(count: int, n: int) -> list[int]:
    """`n` of the numbers 0..count-1, or all if there are no more."""
    n = min(n, count)
    return [i * count // n for i in range(n)]


@dataclass(frozen=True)
class MeasuredLoss:
    """The loss on held-out images, each time at the same timesteps with the same noise; all processes share it.

    Args:
        every_n_steps: steps between two measurements.
        loss: of any network.
    """

    every_n_steps: int
    loss: HeldOutLoss

    def __call__(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        return {LOSS: self.loss(module.network)}


@dataclass(frozen=True)
class SmallEvaluation:
    """Metrics of a few generated images, each time of the same noise and classes; all processes generate.

    Args:
        every_n_steps: steps between two measurements.
        generator: how images are generated.
        labels: classes (n,) of the images.
        seed: of their noise.
        suite: of metrics; None in all processes but the first, which compute none.
        reference: features (M, D) of the images to come near to; None like the suite.
    """

    every_n_steps: int
    generator: ImageGenerator
    labels: Tensor
    seed: int
    suite: MetricSuite | None
    reference: Tensor | None

    def __call__(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        images = self._generate(trainer, module)
        if images is None:
            raise Interrupted
        if self.suite is None:
            return {}
        self.suite.extractor.to(module.device)
        values = self.suite.compare(self.suite.features(images), self.reference)
        return {name: value for name, value in values.items() if family(name) is not None}

    def _generate(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor | None:
        """Images (n, 3, R, R) uint8: process r generates the numbers r, r + world_size, ...; None after a signal.

        Every batch is padded to one size, so the images are the same to the bit whichever process generates them.
        """
        count, processes = len(self.labels), trainer.world_size
        share = -(-count // processes)  # equally many in all processes
        mine = [min(trainer.global_rank + k * processes, count - 1) for k in range(share)]
        images = None
        with suppress(Interrupted), meter(f"generating images at step {trainer.global_step}", len(mine)) as progress:
            arguments = (self.labels[mine], self.seed, mine)
            images = self.generator.generate(module.network, *arguments, on_batch=progress.update, fixed_batch=True)
        if processes == 1:
            return images
        if not trainer.strategy.reduce_boolean_decision(images is not None):  # by all of them
            return None
        gathered = trainer.strategy.all_gather(images.to(module.device)).cpu()  # (processes, len(mine), 3, R, R)
        return gathered.transpose(0, 1).flatten(0, 1)[:count]


class Validation(Callback):
    """Measures the EMA weights before the first step, every so many steps and after the last one.

    Weights, their average, the optimizer and all random numbers stay as they are.

    Args:
        measures: what is measured.
        best: keeps the best weights; None = the last ones are taken.
        patience: measurements without a better value after which the training ends; None = it never does.
    """

    def __init__(self, measures: Sequence[Measure], best: BestWeights | None = None, patience: int | None = None):
        self.measures, self.best, self.patience = measures, best, patience
        self.ended_at: int | None = None  # the step after which patience was at its end
        self.given_up: list[int] = []  # numbers of the measures for which a signal left no time

    def state_dict(self) -> dict[str, Any]:
        return {"given_up": self.given_up}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.given_up = state_dict["given_up"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._measure(trainer, module, self.measures)
            return
        missing = [self.measures[k] for k in self.given_up if k < len(self.measures)]
        if missing:
            self._measure(trainer, module, missing)
        self._lose_patience(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        due = [measure for measure in self.measures if last or step % measure.every_n_steps == 0]
        if due:
            self._measure(trainer, module, due)
            self._lose_patience(trainer)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, due: Sequence[Measure]) -> None:
        step = trainer.global_step
        module.settle()
        module.network.eval()
        with module.ema.applied():
            # all processes decide by the first one's numbers
            values = trainer.strategy.broadcast(self._values(trainer, module, due))
            self.given_up = [] if values is not None else [self.measures.index(measure) for measure in due]
            if values is None:
                module.network.train()
                return
            for logger in trainer.loggers:
                logger.log_metrics({PREFIX + name: value for name, value in values.items()}, step=step)
            if self.best is not None:
                self.best.offer(trainer, module, values)
        module.network.train()
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if self._is_shown(name))
        log.info("step %d: %s", step, shown)

    def _values(self, trainer: pl.Trainer, module: pl.LightningModule, due: Sequence[Measure]) -> dict | None:
        """None where a signal ends the training: what was due is measured when it goes on."""
        try:
            with interruptible_alone(module):
                values = {}
                for measure in due:
                    values |= measure(trainer, module)
                return values
        except Interrupted:
            return None

    def _is_shown(self, name: str) -> bool:
        metric = family(name)
        chosen = self.best is not None and name == self.best.metric
        return chosen or name == LOSS or (metric is not None and metric.headline and not name.endswith("_std"))

    def _lose_patience(self, trainer: pl.Trainer) -> None:
        """End the training where the last `patience` measurements of the chosen metric brought nothing better.

        The state is the step of the best weights alone, so a resumed training ends where an uninterrupted one does.
        """
        if self.patience is None or self.best is None:
            return
        source = next(m for m in self.measures if isinstance(m, MeasuredLoss) == (self.best.metric == LOSS))
        waited = (trainer.global_step - self.best.step) // source.every_n_steps
        if waited < self.patience or trainer.global_step == trainer.max_steps:
            return
        text = "the training ends early, at step %d: val/%s has not been better than at step %d for %d measurements"
        log.info(text, trainer.global_step, self.best.metric, self.best.step, waited)
        self.ended_at = trainer.global_step
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step  # other callbacks do what belongs to the last step
