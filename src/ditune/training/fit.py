"""One training from its config to its run folder."""

import logging
import platform
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from rich.console import Console

import ditune
from ditune.build import Parts, build_drawer, build_parts, make, plain, uses_bf16
from ditune.checkpoints import save_adapter, save_network, write_json
from ditune.data.stream import MicroBatches, PictureStream, micro_batch_size, training_loader
from ditune.drawing import label_plan
from ditune.errors import UserError
from ditune.judging import judge

from .callbacks import DrawSamples, StopOnSignal, peak_memory_mib
from .checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from .loggers import close_loggers
from .metrics_csv import MetricsCsv
from .module import GenerativeModule
from .plan import counts, expected_memory, parameter_table, show
from .progress import TrainingProgress

log = logging.getLogger(__name__)


class StepClock(Callback):
    """Seconds spent in training steps, data loading included, sample sheets not."""

    seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._start


def train(cfg: DictConfig) -> int:
    """Train, draw, evaluate and save into the run folder; returns the exit code of the process.

    Raises:
        UserError: the config or a file is wrong.
    """
    torch.set_flush_denormal(True)  # adaLN-Zero starts with tiny gradients, which are 5 times slower when denormal
    folder = Path(cfg.paths.output_dir)
    checkpoint = resume_checkpoint(cfg, folder)
    parts = build_parts(cfg)
    trainer, clock, stop = build_trainer(cfg, parts, folder)
    micro_batch_size(cfg.batch_size, trainer.accumulate_grad_batches, trainer.world_size)
    module = build_module(cfg, parts)
    if trainer.is_global_zero:
        announce(cfg, parts, trainer, folder)
    if cfg.dry_run:
        return 0
    check_metrics(cfg)
    stream = PictureStream(parts.pictures, cfg.seed, cfg.data.flip)
    result = {"status": "running", **describe(cfg, parts)}
    write_result(trainer, folder, result)
    start = time.perf_counter()
    try:
        fit(trainer, module, stream, cfg, checkpoint)
        steps = trainer.global_step - first_step(checkpoint)
        result |= {
            "status": "stopped" if trainer.global_step < cfg.max_steps else "trained",
            "steps": trainer.global_step,
            "seconds": {"fit": time.perf_counter() - start},
            "images_per_second": steps * cfg.batch_size / max(clock.seconds, 1e-9),
            "peak_memory_mib": peak_memory_mib(module.device),
        }
        if result["status"] == "trained" and trainer.is_global_zero:
            finish(cfg, parts, module, folder, result)
    except BaseException:
        result["status"] = "failed"
        raise
    finally:
        write_result(trainer, folder, result)
        close_loggers(trainer, failed=result["status"] == "failed")
    return 0 if stop.stopped_by is None else 128 + stop.stopped_by


def fit(
    trainer: pl.Trainer, module: GenerativeModule, stream: PictureStream, cfg: DictConfig, checkpoint: Path | None
) -> None:
    if cfg.compile:
        module.network.compile_blocks()
    trainer.fit(module, datamodule=StreamData(stream, cfg), ckpt_path=checkpoint, weights_only=True)


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


def resume_checkpoint(cfg: DictConfig, folder: Path) -> Path | None:
    newest = newest_checkpoint(folder / "checkpoints")
    if cfg.resume not in (None, "auto"):
        raise UserError(f"resume is {cfg.resume!r}. Set resume=auto and run_dir=<the run's folder>, or leave it out.")
    if newest is not None and cfg.resume is None:
        raise UserError(
            f"The run folder {folder} already holds checkpoints. Add resume=auto to go on, or choose another run_dir."
        )
    return newest


def first_step(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.stem.removeprefix("step_"))


def build_module(cfg: DictConfig, parts: Parts) -> GenerativeModule:
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
        identity=identity(cfg, parts),
        log_every=cfg.trainer.log_every_n_steps,
    )


def identity(cfg: DictConfig, parts: Parts) -> dict[str, Any]:
    """What must be the same when a run goes on; other settings (device, workers, max_steps) may change."""
    return {
        "network": parts.network.config,
        "process": parts.objective.process.config,
        "peft": plain(cfg.peft),
        "base_sha256": parts.base_sha256,
        "data": parts.pictures.fingerprint,
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
    }


def build_trainer(cfg: DictConfig, parts: Parts, folder: Path) -> tuple[pl.Trainer, StepClock, StopOnSignal]:
    drawer = build_drawer(cfg, parts)
    labels = label_plan(parts.pictures.labels, cfg.seed, cfg.callbacks.samples.n)
    clock, stop = StepClock(), StopOnSignal(folder / "checkpoints")
    # the clock stands first, so that no other callback's time counts as training
    callbacks = [
        clock,
        TrainingProgress(),
        DrawSamples(drawer, labels, cfg.seed, folder / "samples", cfg.callbacks.samples.every_n_steps),
        stop,
        ModelCheckpoint(
            folder / "checkpoints",
            filename="step_{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=cfg.callbacks.checkpoint.every_n_steps,
            save_top_k=cfg.callbacks.checkpoint.keep,
            monitor="step",
            mode="max",
            save_on_train_epoch_end=False,
        ),
    ]
    table, chosen = MetricsCsv(folder), make(cfg.logger, "logger")
    table.keep_until(first_step(newest_checkpoint(folder / "checkpoints")))
    loggers = [table] if isinstance(chosen, MetricsCsv) else [table, chosen]
    trainer = make(cfg.trainer, "trainer", callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()])
    if trainer.is_global_zero:
        chosen.log_hyperparams(plain(cfg))
    return trainer, clock, stop


def announce(cfg: DictConfig, parts: Parts, trainer: pl.Trainer, folder: Path) -> None:
    """Save the resolved config and show what is going to happen."""
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    console = Console()
    console.print(OmegaConf.to_yaml(cfg, resolve=True), style="dim", highlight=False)
    console.print(parameter_table(parts.network, parts.method))
    micro = micro_batch_size(cfg.batch_size, trainer.accumulate_grad_batches, trainer.world_size)
    shape = parts.autoencoder.latent_shape(cfg.data.resolution)
    memory = expected_memory(parts.network, parts.objective, shape, micro, uses_bf16(cfg))
    passes = cfg.max_steps * cfg.batch_size / len(parts.pictures)
    facts = {
        "run folder": str(folder),
        "base": "none, from scratch" if parts.base is None else f"{parts.base} ({parts.base_sha256[:12]})",
        "data": f"{len(parts.pictures):,} pictures, {parts.pictures.num_classes} classes",
        "latents": " x ".join(map(str, shape)),
        "global batch": f"{cfg.batch_size} = {micro} x {trainer.accumulate_grad_batches} micro-steps "
        f"x {trainer.world_size} processes",
        "steps": f"{cfg.max_steps:,} ({passes:.1f} passes over the data)",
        "expected memory": ", ".join(f"{k} {v:,.0f} MiB" for k, v in memory.items()),
    }
    show(console, facts)


def describe(cfg: DictConfig, parts: Parts) -> dict[str, Any]:
    trainable, total = counts(parts.network)
    return {
        "name": cfg.name,
        "method": type(parts.method).__name__,
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "batch_size": cfg.batch_size,
        "lr": cfg.optimizer.lr,
        "seed": cfg.seed,
        "data": {"fingerprint": parts.pictures.fingerprint, "n": len(parts.pictures)},
        "base": None if parts.base is None else {"file": parts.base.name, "sha256": parts.base_sha256},
        "versions": {
            "ditune": ditune.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_lightning": pl.__version__,
        },
        "threads": torch.get_num_threads(),
    }


def check_metrics(cfg: DictConfig) -> None:
    """What is missing for the evaluation shows before the training, not after it."""
    if cfg.metrics.n:
        make(cfg.metrics.judge, "metrics")
        make(cfg.metrics.reference, "metrics")


def write_result(trainer: pl.Trainer, folder: Path, result: dict[str, Any]) -> None:
    if trainer.is_global_zero:
        write_json(folder / "result.json", result)


def finish(cfg: DictConfig, parts: Parts, module: GenerativeModule, folder: Path, result: dict[str, Any]) -> None:
    """Save what was trained, then judge it and the base by the same protocol."""
    with module.ema.applied():
        start = time.perf_counter()
        save_trained(cfg, parts, folder)
        drawer = build_drawer(cfg, parts)
        result["metrics"] = judge(cfg, drawer, parts.network, parts.base, folder / "samples") if cfg.metrics.n else {}
        result["seconds"]["evaluation"] = time.perf_counter() - start
    result["status"] = "finished"
    after = result["metrics"].get("after", {})
    for logger in module.loggers if after else ():
        logger.log_metrics({f"eval/{key}": value for key, value in after.items()}, step=cfg.max_steps)


def save_trained(cfg: DictConfig, parts: Parts, folder: Path) -> None:
    common = {
        "class_names": parts.pictures.class_names,
        "autoencoder": parts.autoencoder.fingerprint,
        "data": parts.pictures.fingerprint,
        "resolution": cfg.data.resolution,
        "steps": cfg.max_steps,
    }
    process = parts.objective.process.config
    if parts.base is None:
        save_network(folder / "network.safetensors", parts.network, process, **common)
        return
    arguments = {k: v for k, v in plain(cfg.peft).items() if k != "_target_"}
    save_adapter(
        folder / "adapter",
        parts.method.state_dict(parts.network),
        peft=arguments,
        network=parts.network.config,
        process=process,
        base={"file": parts.base.name, "sha256": parts.base_sha256},
        **common,
    )
