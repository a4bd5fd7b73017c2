"""One training, from its config to its run folder."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from ditune.checkpoints import load_network
from ditune.cli import in_sweep
from ditune.commands.prepare import ensure, training_source
from ditune.config import rules
from ditune.config.components import build_comparison, build_components, build_generator
from ditune.config.grammar import resolved
from ditune.config.hardware import settle
from ditune.config.instantiate import instantiate, refuse_missing
from ditune.config.keys import check
from ditune.config.roles import job_hash
from ditune.config.training import build_module, build_outlook, build_trainer, open_loggers, processes_of, resume_key
from ditune.config.validation import build_validation, chosen_metric
from ditune.data import ImageDataset
from ditune.data.stream import ImageStream
from ditune.distributed import leave_at_exit
from ditune.errors import UserError
from ditune.evaluation.comparison import Comparison
from ditune.evaluation.denoising_loss import denoising_loss
from ditune.launch.run_folder import owned
from ditune.memory import memory_for
from ditune.stopping import Signals, listen
from ditune.training import ranks
from ditune.training.callbacks import Validation, peak_memory_mib
from ditune.training.checkpoint_io import newest_checkpoint, remove_checkpoints
from ditune.training.components import Components
from ditune.training.loggers.wandb import WandbRun, close_loggers
from ditune.training.micro_batch import less_memory
from ditune.training.module import GenerativeModule
from ditune.training.plan import announce
from ditune.training.result import RunRecord, describe, has_finished, save_trained, summarise
from ditune.training.resume import find_checkpoint
from ditune.training.source import StreamData

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> int:
    """Train, generate samples, evaluate and save into the run folder; returns the exit code of the process.

    Raises:
        UserError: the config or a file is wrong, or another process trains in the folder.
    """
    check(cfg)
    refuse_missing(cfg)
    folder = Path(cfg.paths.output_dir)
    with listen() as signals, owned(folder), ranks.failures_left(folder):
        return _train(cfg, folder, signals)


def _train(cfg: DictConfig, folder: Path, signals: Signals) -> int:
    key = job_hash(cfg)  # of what was asked for, before the machine decides
    if in_sweep() and has_finished(folder, key):
        log.info("%s already holds the result of this config", folder)
        return 0
    settle(cfg, newest_checkpoint(folder / "checkpoints") if cfg.resume else None)
    instantiate(cfg.logger, "logger")  # what it refuses shows before the data is prepared
    chosen_metric(cfg)  # likewise
    torch.set_flush_denormal(True)  # every result in docs/results was made with it; no speed was gained by it
    if not cfg.dry_run:
        ensure(cfg)

    c = build_components(cfg)
    rules.check(c, rules.OF_A_TRAINING)
    generator, held_out = build_generator(cfg, c), held_out_images(cfg)
    outlook = build_outlook(cfg, c, generator, held_out)
    trainer, clock, stop = build_trainer(cfg, c, generator, folder, outlook, signals)
    if trainer.world_size > 1:
        leave_at_exit()
    c.processes = processes_of(trainer, in_sweep())
    rules.check(c, rules.OF_THE_PROCESSES)
    resumed = find_checkpoint(folder, cfg.resume, cfg.max_steps, resume_key(cfg, c))
    module = build_module(cfg, c, resume_key(cfg, c))
    module.begun_with = resumed.micro_batch

    first = trainer.is_global_zero
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(resolved(cfg), folder / "config.yaml")
        announce(c, trainer, folder, OmegaConf.to_yaml(cfg, resolve=True) if cfg.verbose else None)
    if cfg.dry_run:
        return 0
    comparison = build_comparison(cfg, generator) if first and cfg.metrics.n > 0 else None
    outlook.evaluation_images = cfg.metrics.n * comparison.unknown(c.base_to_compare) if comparison else 0
    validation = build_validation(cfg, trainer, generator, held_out, comparison, resumed.step)
    if validation is not None:  # right behind the clock: it may make this step the last one
        trainer.callbacks.insert(trainer.callbacks.index(clock) + 1, validation)
    source = training_source(cfg, c.images, c.autoencoder)
    stream = ImageStream(source, cfg.seed, cfg.data.flip, instantiate(cfg.augment, "augment"))
    data = StreamData(stream, cfg.batch_size, cfg.data.num_workers)
    module.names = lambda positions: [c.images.names[i] for i in stream.indices(positions)]

    close = partial(close_loggers, trainer)
    enough = memory_for("the training", lambda: less_memory(trainer, module))
    with RunRecord(folder, describe(c, key), resumed.seconds, stop, trainer, first, close) as record, enough:
        open_loggers(cfg, trainer, folder, resumed.step, c)
        if cfg.compile:
            module.network.compile_blocks()
        trainer.fit(module, datamodule=data, ckpt_path=resumed.path, weights_only=True)
        record.trained(trainer, resumed.step, cfg.batch_size, clock.seconds)
        record.values["peak_memory_mib"] = peak_memory_mib(trainer.strategy.root_device)
        if module.routing:
            record.values["routing"] = module.routing
        if record.status == "trained":
            record.values["evaluated"] = take_weights(module, trainer, validation)
        if record.status == "trained" and first:
            with stop.at_once(trainer, record.values["evaluated"]["checkpoint"] == "last"):
                finish(c, module, trainer, comparison, held_out, record, folder)
    if first and record.status == "finished" and not cfg.callbacks.checkpoint.keep_finished:
        remove_checkpoints(folder / "checkpoints")  # result.json says already that nobody has to go on from them
    if stop.agreed and trainer.world_size > 1:
        ranks.leave_together(trainer)
    return record.exit_code


def take_weights(module: GenerativeModule, trainer: pl.Trainer, validation: Validation | None) -> dict[str, Any]:
    """Decide which weights are saved and evaluated, and give them to the module; returns what result.json says of it.

    They are an average (EMA): the best one where callbacks.checkpoint.best is set, else the last one.
    """
    ended = {}
    if validation is not None and validation.ended_at is not None:
        ended = {"ended_early_at": validation.ended_at}
    if validation is not None and validation.best is not None:
        if validation.best.found:
            return validation.best.take(module) | ended
        log.warning("val/%s was never a number: the last weights are saved and evaluated", validation.best.metric)
    return {"checkpoint": "last", "step": trainer.global_step} | ended


def held_out_images(cfg: DictConfig) -> ImageDataset | None:
    """Images that are not trained on, for the loss on them; None if the data has no such split."""
    try:
        return instantiate(cfg.data.pictures, "data", split=cfg.metrics.loss_split)
    except UserError as error:
        log.info("no loss on held-out images: %s", error)
        return None


def finish(
    c: Components,
    module: GenerativeModule,
    trainer: pl.Trainer,
    comparison: Comparison | None,
    held_out: ImageDataset | None,
    record: RunRecord,
    folder: Path,
) -> None:
    """Save what was trained, then evaluate it and the base by the same protocol."""
    values = record.values
    c.network.to(trainer.strategy.root_device)  # Lightning has put it back on the CPU
    with module.ema.applied():
        start = time.perf_counter()
        save_trained(c, folder, values["evaluated"]["step"])
        if c.base is not None:
            values["adapter_bytes"] = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        values["denoising"] = {} if held_out is None else denoising(c, held_out)
        compared = comparison is not None
        values["metrics"] = comparison(c.network, c.base_to_compare, folder / "samples") if compared else {}
        values["seconds"]["evaluation"] = time.perf_counter() - start
    values["status"] = "finished"
    summarise(values, folder)
    after = values["metrics"].get("after", {})
    for logger in trainer.loggers:
        if after:
            logger.log_metrics({f"eval/{key}": value for key, value in after.items()}, step=values["evaluated"]["step"])
        if isinstance(logger, WandbRun):
            logger.finish_training(folder)


def denoising(c: Components, images: ImageDataset) -> dict[str, float]:
    """Loss on held-out images after the training, and of the base before it."""
    networks = {"after": c.network.eval()}
    if c.base_to_compare is not None:
        before = load_network(c.base_to_compare, c.network.config, **c.objective.process.network)
        networks["before"] = before.to(next(c.network.parameters()).device).eval()
    arguments = (c.objective, c.autoencoder, images, c.settings.metrics_seed, c.settings.bf16)
    return {name: denoising_loss(network, *arguments) for name, network in networks.items()}
