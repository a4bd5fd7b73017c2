"""The trainer, the module and the loggers of a training's config, and what must stay when it goes on."""

import logging
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, read_write

from ditune.config.base_network import given_process
from ditune.config.grammar import between_quotes
from ditune.config.instantiate import instantiate, plain
from ditune.config.needs import without_secrets
from ditune.config.roles import NEUTRAL_BELOW, Decides, leave_out, role_of
from ditune.data import ImageDataset
from ditune.errors import UserError
from ditune.evaluation.denoising_loss import REPEATS
from ditune.generation.generator import ImageGenerator
from ditune.networks import DiTMoE
from ditune.objectives import Objective
from ditune.stopping import Signals
from ditune.training.callbacks import (
    Checkpoints,
    CompareRanks,
    RoutingMonitor,
    SampleGrids,
    StepClock,
    StepGrids,
    StopOnSignal,
    TrainingProgress,
)
from ditune.training.checkpoint_io import LEAST, AtomicCheckpointIO
from ditune.training.components import Components, Processes
from ditune.training.loggers.metrics_csv import MetricsCsv
from ditune.training.loggers.wandb import WandbRun
from ditune.training.micro_batch import AUTO, FitMicroBatch
from ditune.training.module import GenerativeModule
from ditune.training.nonfinite import NonFinite
from ditune.training.outlook import Outlook, forward_passes
from ditune.training.plan import parameter_kinds
from ditune.training.ranks import join
from ditune.training.sharding import Sharded
from ditune.training.unprofiled import Unprofiled

log = logging.getLogger(__name__)

AROUND = ("transfer", "patches", "sparsity")  # groups that change what an objective does to the weights


def resume_key(cfg: DictConfig, c: Components) -> dict[str, Any]:
    """What must be the same when a run goes on, by the roles of the keys.

    Devices, workers and what is logged may change, and max_steps if only the learning rate depends on it. A key
    stands as plain values, unless what it names is known by something better, such as a fingerprint.
    """
    # inside of the objective, so that a run that goes on without it differs too
    around = {group: plain(cfg[group]) for group in AROUND if cfg.get(group) is not None}
    if not around.get("sparsity", {}).get("teacher", True):
        del around["sparsity"]["teacher"]  # newer than stored checkpoints
    # likewise
    frozen = {} if cfg.get("frozen_weights") is None else {"frozen_weights": cfg.frozen_weights}
    known_by = {
        "network": {"network": c.network.config},
        "objective": {
            "objective": without_neutral(plain(cfg.objective)) | hashes_of(c.objective) | around,
            "max_steps": cfg.max_steps if c.objective.scheduled else None,
        },
        "autoencoder": {"autoencoder": c.autoencoder.latent_fingerprint},
        "scheduler": {"scheduler": {k: v for k, v in plain(cfg.scheduler).items() if k != "max_steps"}},
        "pretrained": {"base_sha256": None if c.base is None else c.base.sha256},
        "pretrained_process": {
            "pretrained_process": given_process(cfg.get("pretrained_process"), "pretrained_process")
        },
        "transfer": {},
        "patches": {},
        "sparsity": {},
        "new_resolution": {},  # the network's config says it
        "data": {"data": c.images.fingerprint, "flip": cfg.data.flip},
        "peft": {"peft": plain(cfg.peft) | frozen},
        "frozen_weights": {},
        "trainer": {"precision": cfg.trainer.precision, "gradient_clip_val": cfg.trainer.gradient_clip_val},
    }
    key: dict[str, Any] = {}
    for name in cfg:
        role = role_of(str(name))
        if role.decides is Decides.TRAINING and cfg[name] != role.neutral:
            value = cfg[name]
            key |= known_by.get(name, {name: plain(value) if isinstance(value, DictConfig) else value})
    return key


def hashes_of(objective: Objective) -> dict[str, str]:
    """What a teacher and pairs are known by, wherever they lie."""
    sources = {key: getattr(objective, key, None) for key in ("teacher", "pairs")}
    return {key: source.sha256 for key, source in sources.items() if source is not None}


def without_neutral(objective: dict[str, Any]) -> dict[str, Any]:
    """The values of an objective without a key that is newer than stored checkpoints, at its neutral value."""
    values = {"objective": objective}
    for name, neutral in NEUTRAL_BELOW.items():
        if name.startswith("objective."):
            leave_out(values, name, neutral)
    return objective


def build_module(cfg: DictConfig, c: Components, key: dict[str, Any]) -> GenerativeModule:
    """The LightningModule; `key` is the resume key that its checkpoints hold."""
    return GenerativeModule(
        c.network,
        c.objective,
        c.method,
        c.autoencoder,
        instantiate(cfg.optimizer, "optimizer"),
        instantiate(cfg.scheduler, "scheduler"),
        ema_decay=cfg.ema.decay,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        identity=key,
        balance=c.balance,
        log_every=cfg.trainer.log_every_n_steps,
        nonfinite=NonFinite(**cfg.callbacks.nonfinite),
        sparsity=c.sparsity,
    )


def build_outlook(cfg: DictConfig, c: Components, generator: ImageGenerator, held_out: ImageDataset | None) -> Outlook:
    """What the run does besides its steps; the evaluation's images are added once it is known what a record holds."""
    networks = 1 if c.base_to_compare is None else 2  # the base's loss is measured beside the run's
    loss, small = cfg.callbacks.held_out, cfg.callbacks.metrics
    checks = [(loss.every_n_steps, loss.n * REPEATS), (small.every_n_steps, small.n * forward_passes(generator))]
    return Outlook(
        max_steps=cfg.max_steps,
        batch_size=cfg.batch_size,
        calls=forward_passes(generator),
        sheet_images=cfg.callbacks.samples.n,
        every_n_steps=cfg.callbacks.samples.every_n_steps,
        held_out_calls=0 if held_out is None else len(held_out) * REPEATS * networks,
        checks=[(every, calls) for every, calls in checks if every is not None],
    )


def build_trainer(
    cfg: DictConfig, c: Components, generator: ImageGenerator, folder: Path, outlook: Outlook, signals: Signals
) -> tuple[pl.Trainer, StepClock, StopOnSignal]:
    """The trainer without its loggers, which `open_loggers` adds once nothing can be wrong any more."""
    refuse_alone(cfg)
    samples, checkpoint = cfg.callbacks.samples, cfg.callbacks.checkpoint
    clock, stop = StepClock(), StopOnSignal(folder / "checkpoints", signals)
    # the clock stands first, so that no other callback's time counts as training
    callbacks = [
        clock,
        TrainingProgress(outlook),
        SampleGrids(generator, c.images, samples.n, cfg.seed, folder / "samples", samples.every_n_steps, outlook),
    ]
    # each callback costs every step six calls, so one that would never do anything is left out
    if isinstance(c.network, DiTMoE):
        callbacks.append(RoutingMonitor(folder / "routing", cfg.callbacks.routing.every_n_steps))
    if generator.process.network.get("step"):
        grids = cfg.callbacks.strips
        arguments = (grids.n, list(grids.steps), cfg.seed, folder / "samples", samples.every_n_steps)
        callbacks.append(StepGrids(generator, c.images, *arguments))
    # what is logged at a step comes before what saves it
    callbacks.append(CompareRanks(cfg.callbacks.ranks.compare_every_n_steps))  # before anything is saved
    callbacks += [stop, Checkpoints(folder / "checkpoints", checkpoint.every_n_steps)]
    files = AtomicCheckpointIO(kept_checkpoints(checkpoint), checkpoint.on_full)
    others = {"callbacks": callbacks, "logger": False, "plugins": [files]}
    if "profiler" not in cfg.trainer:
        others["profiler"] = Unprofiled()
    if cfg.trainer.accumulate_grad_batches == AUTO:
        shape = c.autoencoder.latent_shape(c.settings.resolution)
        callbacks.append(FitMicroBatch(shape, c.settings.bf16, cfg.compile))
        others["accumulate_grad_batches"] = 1  # until it is found
    trainer = instantiate(cfg.trainer, "trainer", **others)
    if trainer.world_size == 1:
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, CompareRanks)]
    tell_ranks(folder)
    join(trainer, signals, folder)
    return trainer, clock, stop


def refuse_alone(cfg: DictConfig) -> None:
    """Refuse a training on several machines that nothing has started there: it would wait for the others for ever."""
    nodes = cfg.trainer.get("num_nodes", 1)
    if nodes == 1 or cfg.dry_run or any(name in os.environ for name in ("RANK", "SLURM_PROCID", "NODE_RANK")):
        return
    raise UserError(
        f"trainer.num_nodes is {nodes}, and nothing has started this training on several machines. "
        "Start it by torchrun on each of them, or by srun (docs/guide/sweeps.md)."
    )


def kept_checkpoints(checkpoint: DictConfig) -> int:
    """How many checkpoints stay, from callbacks.checkpoint: never fewer than two, because the last may be damaged."""
    if 0 <= checkpoint.keep < LEAST and checkpoint.every_n_steps:
        log.warning(
            "callbacks.checkpoint.keep=%d is raised to %d: the newest checkpoint may turn out to be damaged. "
            "For no checkpoints set callbacks.checkpoint.every_n_steps=0.",
            *(checkpoint.keep, LEAST),
        )
        return LEAST
    return checkpoint.keep


def processes_of(trainer: pl.Trainer, in_sweep: bool) -> Processes:
    """How the trainer spreads a training."""
    strategy = trainer.strategy
    alone = trainer.world_size == 1 or strategy.cluster_environment.creates_processes_externally
    searched = any(isinstance(callback, FitMicroBatch) for callback in trainer.callbacks)
    shares = trainer.world_size if isinstance(strategy, Sharded) else 1
    return Processes(trainer.world_size, trainer.accumulate_grad_batches, in_sweep and not alone, searched, shares)


def tell_ranks(folder: Path) -> None:
    """Lightning starts further ranks with hydra.run.dir="<folder>", whatever is in the folder's name."""
    if not HydraConfig.initialized():
        return
    run = HydraConfig.get().run
    with read_write(run):
        run.dir = between_quotes(str(folder))


def open_loggers(cfg: DictConfig, trainer: pl.Trainer, folder: Path, first_step: int, c: Components) -> None:
    """metrics.csv and the loggers of the config."""
    built = instantiate(cfg.logger, "logger")
    chosen = built if isinstance(built, list) else [built]
    table = next((logger for logger in chosen if isinstance(logger, MetricsCsv)), None) or MetricsCsv(folder)
    table.keep_until(first_step)
    trainer.loggers = [table, *(logger for logger in chosen if logger is not table)]
    if not trainer.is_global_zero:
        return
    for logger in chosen:
        if isinstance(logger, WandbRun):
            logger.keep_id()
        logger.log_hyperparams(plain(without_secrets(cfg)))
        if isinstance(logger, WandbRun):
            logger.describe([(kind, *sizes) for kind, sizes in parameter_kinds(c.network).items()])
