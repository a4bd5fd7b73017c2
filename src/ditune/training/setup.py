"""What a training needs before its first step: module, trainer, data, and the checkpoint that it goes on from."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, read_write
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from ditune.config.components import Parts, build_drawer, given_process, make, plain
from ditune.config.grammar import between_quotes
from ditune.data import Pictures
from ditune.data.stream import MicroBatches, PictureStream, training_loader
from ditune.errors import UserError
from ditune.evaluation.denoising_loss import REPEATS
from ditune.files.atomic import read_json
from ditune.generation.generator import Drawer
from ditune.training.callbacks import DrawSamples, StepClock, StopOnSignal
from ditune.training.callbacks.progress import TrainingProgress
from ditune.training.callbacks.routing import RoutingMonitor
from ditune.training.callbacks.step_grids import DrawStrips
from ditune.training.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from ditune.training.loggers.metrics_csv import MetricsCsv
from ditune.training.loggers.wandb import WandbRun
from ditune.training.module import GenerativeModule
from ditune.training.outlook import Outlook, forward_passes
from ditune.training.plan import parameter_kinds

log = logging.getLogger(__name__)


class StreamData(pl.LightningDataModule):
    """Hands the trainer a loader that begins at the step that the trainer has been restored to."""

    def __init__(self, stream: PictureStream, cfg: DictConfig):
        super().__init__()
        self.stream, self.cfg = stream, cfg

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        batches = MicroBatches(
            self.cfg.batch_size,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            trainer.global_step,
        )
        pin_memory = trainer.strategy.root_device.type == "cuda"
        return training_loader(self.stream, batches, self.cfg.data.num_workers, pin_memory)


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from; path None and step 0 for a new run."""

    path: Path | None
    step: int


def find_checkpoint(cfg: DictConfig, folder: Path, identity: dict[str, Any]) -> Resumed:
    """The newest whole checkpoint of the run folder.

    Raises:
        UserError: there is one and `resume` is not set, or it is of a run with other settings or lies behind max_steps.
    """
    if cfg.resume not in (None, "auto"):
        raise UserError(f"resume is {cfg.resume!r}. Set resume=auto and run_dir=<the run's folder>, or leave it out.")
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is None:
        result = folder / "result.json"
        if result.is_file() and read_json(result).get("status") == "finished":
            raise UserError(
                f"The run folder {folder} holds a finished run, whose checkpoints are gone or were never due. "
                "Choose another run_dir, or delete the folder to run it again."
            )
        if cfg.resume:
            log.warning("nothing to resume in %s: the run begins at step 0", folder)
        return Resumed(None, 0)
    if cfg.resume is None:
        raise UserError(
            f"The run folder {folder} already holds checkpoints. Add resume=auto to go on, or choose another run_dir."
        )
    checkpoint = torch.load(newest, map_location="cpu", weights_only=True)
    step = checkpoint["global_step"]
    theirs = checkpoint["identity"]
    different = [f"{k} ({theirs.get(k)} there, {v} now)" for k, v in identity.items() if theirs.get(k) != v]
    if different:
        raise UserError(
            f"The checkpoint is of another run: {', '.join(different)}. "
            "Resume with the run's own settings, or start a new run folder."
        )
    if step > cfg.max_steps:
        raise UserError(
            f"In {folder} the run is at step {step} already; max_steps={cfg.max_steps} lies before it. "
            f"Set max_steps={step} or more, or start a new run folder."
        )
    return Resumed(newest, step)


def identity(cfg: DictConfig, parts: Parts) -> dict[str, Any]:
    """What must be the same when a run goes on; devices, workers, max_steps (where nothing but the rate
    depends on it) and what is logged may change."""
    scheduler = {key: value for key, value in plain(cfg.scheduler).items() if key != "max_steps"}
    return {
        "network": parts.network.config,
        "objective": plain(cfg.objective),
        "max_steps": cfg.max_steps if parts.objective.scheduled else None,
        "peft": plain(cfg.peft),
        "autoencoder": parts.autoencoder.latent_fingerprint,
        "optimizer": plain(cfg.optimizer),
        "scheduler": scheduler,
        "ema": plain(cfg.ema),
        "base_sha256": parts.base_sha256,
        "pretrained_process": given_process(cfg.get("pretrained_process"), "pretrained_process"),
        "classes": cfg.classes,
        "data": parts.pictures.fingerprint,
        "flip": cfg.data.flip,
        "augment": plain(cfg.augment) if cfg.augment else None,
        "batch_size": cfg.batch_size,
        "precision": cfg.trainer.precision,
        "gradient_clip_val": cfg.trainer.gradient_clip_val,
        "seed": cfg.seed,
        "balance": plain(cfg.balance) if cfg.balance else None,
    }


def build_module(cfg: DictConfig, parts: Parts, identity: dict[str, Any]) -> GenerativeModule:
    return GenerativeModule(
        parts.network,
        parts.objective,
        parts.method,
        parts.autoencoder,
        make(cfg.optimizer, "optimizer"),
        make(cfg.scheduler, "scheduler"),
        ema_decay=cfg.ema.decay,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        identity=identity,
        balance=parts.balance,
        log_every=cfg.trainer.log_every_n_steps,
    )


def build_outlook(cfg: DictConfig, parts: Parts, drawer: Drawer, held_out: Pictures | None) -> Outlook:
    """What the run does besides its steps; the evaluation's images are added once it is known what a record holds."""
    networks = 1 if parts.base is None or parts.reshaped else 2  # the base's loss is measured beside the run's
    return Outlook(
        max_steps=cfg.max_steps,
        batch_size=cfg.batch_size,
        calls=forward_passes(drawer),
        sheet_images=cfg.callbacks.samples.n,
        every_n_steps=cfg.callbacks.samples.every_n_steps,
        held_out_calls=0 if held_out is None else len(held_out) * REPEATS * networks,
    )


def build_trainer(
    cfg: DictConfig, parts: Parts, folder: Path, outlook: Outlook
) -> tuple[pl.Trainer, StepClock, StopOnSignal]:
    """The trainer without its loggers, which `open_loggers` adds once nothing can be wrong any more."""
    drawer = build_drawer(cfg, parts)
    sheets = cfg.callbacks.samples
    clock, stop = StepClock(), StopOnSignal(folder / "checkpoints")
    # the clock stands first, so that no other callback's time counts as training
    callbacks = [
        clock,
        TrainingProgress(outlook),
        DrawSamples(drawer, parts.pictures, sheets.n, cfg.seed, folder / "samples", sheets.every_n_steps, outlook),
        RoutingMonitor(folder / "routing", cfg.callbacks.routing.every_n_steps),
        stop,
        ModelCheckpoint(
            folder / "checkpoints",
            filename="step_{step:08d}",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            every_n_train_steps=cfg.callbacks.checkpoint.every_n_steps,
            save_top_k=cfg.callbacks.checkpoint.keep,
            monitor="step",
            mode="max",
            save_on_train_epoch_end=False,
        ),
    ]
    if drawer.process.network.get("step"):
        strips = cfg.callbacks.strips
        arguments = (strips.n, list(strips.steps), cfg.seed, folder / "samples", sheets.every_n_steps)
        callbacks.append(DrawStrips(drawer, parts.pictures, *arguments))
    trainer = make(cfg.trainer, "trainer", callbacks=callbacks, logger=False, plugins=[AtomicCheckpointIO()])
    tell_ranks(folder)
    return trainer, clock, stop


def tell_ranks(folder: Path) -> None:
    """Lightning starts further ranks with hydra.run.dir="<folder>", whatever is in the folder's name."""
    if not HydraConfig.initialized():
        return
    run = HydraConfig.get().run
    with read_write(run):
        run.dir = between_quotes(str(folder))


def open_loggers(cfg: DictConfig, trainer: pl.Trainer, folder: Path, first_step: int, network: nn.Module) -> None:
    """metrics.csv and the logger of the config."""
    chosen = make(cfg.logger, "logger")
    table = chosen if isinstance(chosen, MetricsCsv) else MetricsCsv(folder)
    table.keep_until(first_step)
    trainer.loggers = [table] if chosen is table else [table, chosen]
    if trainer.is_global_zero:
        if isinstance(chosen, WandbRun):
            chosen.keep_id()
        chosen.log_hyperparams(plain(cfg))
        if isinstance(chosen, WandbRun):
            chosen.describe([(kind, *sizes) for kind, sizes in parameter_kinds(network).items()])
