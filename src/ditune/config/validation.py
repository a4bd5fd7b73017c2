"""What a training measures while it runs, and by what its weights are chosen, from the config."""

from pathlib import Path
from zlib import crc32

import pytorch_lightning as pl
from omegaconf import DictConfig

from ditune.config.instantiate import instantiate
from ditune.config.references import reference_images
from ditune.errors import UserError
from ditune.evaluation.comparison import Comparison
from ditune.evaluation.denoising_loss import HeldOutLoss
from ditune.evaluation.held_out import HeldOut
from ditune.generation.generator import ImageGenerator, label_plan
from ditune.metrics import check_counts
from ditune.metrics.names import is_compared
from ditune.rng import mix, seeded
from ditune.training.best_weights import BestWeights
from ditune.training.callbacks.validation import (
    LOSS,
    PREFIX,
    MeasuredLoss,
    SmallEvaluation,
    Validation,
    evenly_spread,
)
from ditune.training.components import Components

REFERENCE = 10_000  # images that a small evaluation compares with, at most: its time grows with their square


def chosen_metric(cfg: DictConfig) -> str | None:
    """The metric of callbacks.checkpoint.best, without "val/"; None = the last weights are taken.

    Raises:
        UserError: it is not measured, or no metric; or early stopping has nothing to go by.
    """
    callbacks = cfg.callbacks
    asked = callbacks.checkpoint.best
    if asked is None:
        if callbacks.early_stopping.patience is not None:
            raise UserError(
                "callbacks.early_stopping.patience needs a metric to go by. "
                "Set callbacks.checkpoint.best=loss, or to a metric such as kid_efflite0."
            )
        return None
    metric = asked.removeprefix(PREFIX)
    if metric != LOSS and not is_compared(metric):
        raise UserError(
            f"callbacks.checkpoint.best is {asked}, by which weights cannot be compared. "
            "Set loss, or a metric such as kid_efflite0."
        )
    source = "held_out" if metric == LOSS else "metrics"
    if callbacks[source].every_n_steps is None:
        raise UserError(
            f"callbacks.checkpoint.best={asked} needs measurements. "
            f"Set callbacks.{source}.every_n_steps=<steps between two of them>."
        )
    return metric


def build_validation(
    cfg: DictConfig,
    trainer: pl.Trainer,
    c: Components,
    generator: ImageGenerator,
    held_out: HeldOut | None,
    comparison: Comparison | None,
    first_step: int,
) -> Validation | None:
    """The callback that measures; None = nothing is to be measured.

    The first process computes the features of the reference here if no cache has them, before others wait for it.

    Args:
        cfg: of the training.
        trainer: of the training.
        c: its objects.
        generator: of the run's images.
        held_out: the images of metrics.loss_split; None = there are none.
        comparison: the final evaluation, whose extractor is shared; None = there is none, or in another process.
        first_step: that the training goes on from.

    Raises:
        UserError: what is asked for cannot be measured.
    """
    measures = []
    if cfg.callbacks.held_out.every_n_steps is not None:
        measures.append(held_out_loss(cfg, c, held_out))
    if cfg.callbacks.metrics.every_n_steps is not None:
        measures.append(small_evaluation(cfg, trainer, generator, comparison))
    if not measures:
        return None
    metric, first = chosen_metric(cfg), trainer.is_global_zero
    checkpoints = Path(cfg.paths.output_dir) / "checkpoints"
    best = None if metric is None else BestWeights(checkpoints, metric, first_step, cfg.max_steps, first)
    return Validation(measures, best, cfg.callbacks.early_stopping.patience)


def held_out_loss(cfg: DictConfig, c: Components, images: HeldOut | None) -> MeasuredLoss:
    """The loss on held-out images.

    Raises:
        UserError: there are none.
    """
    held = cfg.callbacks.held_out
    if images is None:
        raise UserError(
            f"callbacks.held_out needs images that are not trained on, and data={cfg.data.name} has no split "
            f"{cfg.metrics.loss_split}. Set metrics.loss_split to one that it has, or "
            "callbacks.held_out.every_n_steps=null."
        )
    loss = HeldOutLoss(c.objective, images, c.settings.metrics_seed, c.settings.bf16, limit=held.n)
    return MeasuredLoss(held.every_n_steps, loss)


def small_evaluation(
    cfg: DictConfig, trainer: pl.Trainer, generator: ImageGenerator, comparison: Comparison | None
) -> SmallEvaluation:
    """The metrics of a few images.

    Raises:
        UserError: the images are too few for metrics, or the extractor's weights are missing.
    """
    small, suite, features = cfg.callbacks.metrics, None, None
    reference = reference_images(cfg) if comparison is None else comparison.evaluation.reference
    check_counts(small.n, len(reference))
    if trainer.is_global_zero:
        with seeded(cfg.seed):  # extractors are built with random weights before their own are read
            suite = instantiate(cfg.metrics.judge, "metrics") if comparison is None else comparison.evaluation.suite
        suite.extractor.to(trainer.strategy.root_device)
        features = suite.reference(reference)[evenly_spread(len(reference), REFERENCE)]
    seed = mix(cfg.metrics.seed, crc32(b"validation"))  # what is chosen by these images is evaluated on others
    labels = label_plan(reference.labels, seed, small.n)
    return SmallEvaluation(small.every_n_steps, generator, labels, seed, suite, features)
