"""One training from its config to its run folder."""

import logging
import platform
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

import ditune
from ditune.checkpoints import load_network, save_adapter, save_network
from ditune.cli import in_sweep
from ditune.commands.evaluate import Comparison, build_comparison
from ditune.commands.prepare import ensure, training_source
from ditune.config.components import Parts, build_drawer, build_parts, make, refuse_missing, uses_bf16
from ditune.config.hardware import settle
from ditune.config.keys import check
from ditune.data import Pictures
from ditune.data.stream import PictureStream, micro_batch_size
from ditune.errors import UserError
from ditune.evaluation.denoising_loss import denoising_loss
from ditune.files.atomic import read_json, write_json
from ditune.launch.jobs import config_hash
from ditune.launch.run_folder import owned
from ditune.networks import DiTMoE
from ditune.peft import Full
from ditune.training.callbacks import peak_memory_mib
from ditune.training.checkpoint_io import newest_checkpoint
from ditune.training.loggers.wandb import WandbRun, close_loggers
from ditune.training.module import GenerativeModule
from ditune.training.plan import announce, counts
from ditune.training.setup import (
    Resumed,
    StreamData,
    build_module,
    build_outlook,
    build_trainer,
    find_checkpoint,
    identity,
    open_loggers,
)

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> int:
    """Train, draw, evaluate and save into the run folder; returns the exit code of the process.

    Raises:
        UserError: the config or a file is wrong, or another process trains in the folder.
    """
    check(cfg)
    refuse_missing(cfg)
    folder = Path(cfg.paths.output_dir)
    with owned(folder):
        return _train(cfg, folder)


def _train(cfg: DictConfig, folder: Path) -> int:
    key = config_hash(cfg)  # of what was asked for, before the machine decides
    if in_sweep() and has_finished(folder, key):
        log.info("%s already holds the result of this config", folder)
        return 0
    settle(cfg, newest_checkpoint(folder / "checkpoints") if cfg.resume else None)
    make(cfg.logger, "logger")  # what it refuses shows before the data is prepared
    torch.set_flush_denormal(True)  # every result in docs/results was made with it; no speed was gained by it
    if not cfg.dry_run:
        ensure(cfg)
    parts = build_parts(cfg)
    check_combination(cfg, parts)
    drawer, held_out = build_drawer(cfg, parts), held_out_images(cfg)
    outlook = build_outlook(cfg, parts, drawer, held_out)
    trainer, clock, stop = build_trainer(cfg, parts, folder, outlook)
    check_processes(cfg, trainer)
    marks = identity(cfg, parts)
    resumed = find_checkpoint(cfg, folder, marks)
    module = build_module(cfg, parts, marks)
    if trainer.is_global_zero:
        announce(cfg, parts, trainer, folder)
    if cfg.dry_run:
        return 0
    judged = trainer.is_global_zero and cfg.metrics.n > 0
    comparison = build_comparison(cfg, drawer) if judged else None
    if comparison is not None:
        outlook.evaluation_images = cfg.metrics.n * comparison.unknown(base_to_compare(parts))
    source = training_source(cfg, parts.pictures, parts.autoencoder)
    stream = PictureStream(source, cfg.seed, cfg.data.flip, make(cfg.augment, "augment"))
    before = earlier_seconds(folder, resumed)
    result = {"status": "running", **describe(cfg, parts, key), "seconds": {"fit": before}}
    write_result(trainer, folder, result)
    start = time.perf_counter()
    try:
        open_loggers(cfg, trainer, folder, resumed.step, parts.network)
        if cfg.compile:
            module.network.compile_blocks()
        trainer.fit(module, datamodule=StreamData(stream, cfg), ckpt_path=resumed.path, weights_only=True)
        steps = trainer.global_step - resumed.step
        result |= {
            "status": "stopped" if trainer.global_step < cfg.max_steps else "trained",
            "steps": trainer.global_step,
            "seconds": {"fit": before + time.perf_counter() - start},
            "seconds_per_step": clock.seconds / steps if steps else None,
            "images_per_second": steps * cfg.batch_size / clock.seconds if steps else None,
            "peak_memory_mib": peak_memory_mib(trainer.strategy.root_device),
            **({"routing": module.routing} if module.routing else {}),
        }
        if result["status"] == "trained" and trainer.is_global_zero:
            with stop.at_once():
                finish(cfg, parts, module, trainer, comparison, held_out, result)
    except KeyboardInterrupt:
        if result["status"] != "trained" or stop.stopped_by is None:
            result |= {"status": "failed", "error": "interrupted"}
            raise
        log.warning("stopped while the network was judged; what was trained is saved, resume=auto judges it again")
        result["status"] = "stopped"
    except BaseException as error:
        if result["status"] == "running":
            result["seconds"] = {"fit": before + time.perf_counter() - start}
        result |= {"status": "failed", "error": str(error)}
        raise
    finally:
        write_result(trainer, folder, result)
        close_loggers(trainer, failed=result["status"] == "failed")
    # only the first process speaks for all: Lightning kills it when another one exits with a code of its own
    stopped = result["status"] == "stopped" and trainer.is_global_zero and stop.stopped_by is not None
    return 128 + stop.stopped_by if stopped else 0


def check_combination(cfg: DictConfig, parts: Parts) -> None:
    """Refuse what can be composed but cannot work.

    Raises:
        UserError: with the remedy.
    """
    if parts.base is None and not isinstance(parts.method, Full):
        raise UserError(
            f"peft={cfg.peft.name} adapts a pretrained network, and there is none. "
            "Set pretrained=<file>, or peft=full to train from scratch."
        )
    if parts.base is None and not parts.method.train_labels:
        raise UserError("The label table of a network from scratch must train. Set peft.train_labels=true.")
    parts.objective.check(cfg.batch_size)
    if parts.balance is not None and not isinstance(parts.network, DiTMoE):
        raise UserError("The network has no experts whose load could be balanced. Leave balance= out, or set network=.")
    if parts.base is not None and parts.balance is not None and parts.balance.bias_rate:
        raise UserError(
            "Biases of the routers move with balance.bias_rate, and an adapter has no place for them. "
            "Set balance.bias_rate=0."
        )
    if parts.objective.forward_mode and not parts.method.forward_mode:
        raise UserError(
            f"{type(parts.objective).__name__} differentiates the network by its input, which peft={cfg.peft.name} "
            "cannot. Choose another method, or objective=shortcut."
        )
    guided = getattr(parts.objective, "guidance", 1) != 1
    nulls = guided or cfg.objective.label_drop > 0 or cfg.augment is not None
    if parts.network.config["class_dropout_prob"] <= 0 and nulls:
        raise UserError(
            "The network has no null class for dropped labels, guidance or changed pictures. "
            "Set objective.label_drop=0, guidance=1 and no augment=, or network.class_dropout_prob above 0."
        )
    if cfg.augment is not None and cfg.data.latents:
        raise UserError("Latents that are encoded once cannot be changed. Set data.latents=false, or no augment=.")


def check_processes(cfg: DictConfig, trainer: pl.Trainer) -> None:
    """Refuse a batch that cannot be shared, and launchers whose jobs would start the whole sweep again."""
    micro_batch_size(cfg.batch_size, trainer.accumulate_grad_batches, trainer.world_size)
    strategy = trainer.strategy
    alone = trainer.world_size == 1 or strategy.cluster_environment.creates_processes_externally
    if in_sweep() and not alone:
        raise UserError(
            "This hydra/launcher runs jobs in its own process, which cannot start others for them. "
            "Leave hydra/launcher out, or give every process a task (docs/guide/sweeps.md)."
        )


def has_finished(folder: Path, key: str) -> bool:
    """Whether the folder holds the result of a finished run of the config with this hash."""
    path = folder / "result.json"
    if not path.is_file():
        return False
    result = read_json(path)
    return (result.get("status"), result.get("config_hash")) == ("finished", key)


def earlier_seconds(folder: Path, resumed: Resumed) -> float:
    """Seconds of training that a resumed run has behind it."""
    path = folder / "result.json"
    if resumed.path is None or not path.is_file():
        return 0.0
    return read_json(path).get("seconds", {}).get("fit", 0.0)


def describe(cfg: DictConfig, parts: Parts, key: str) -> dict[str, Any]:
    trainable, total = counts(parts.network)
    return {
        "name": cfg.name,
        "config_hash": key,
        "method": parts.method.title,
        "peft": parts.method.arguments,
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "batch_size": cfg.batch_size,
        "max_steps": cfg.max_steps,
        "lr": cfg.optimizer.lr,
        "precision": cfg.trainer.precision,
        "seed": cfg.seed,
        "data": {"name": cfg.data.name, "fingerprint": parts.pictures.fingerprint, "n": len(parts.pictures)},
        "base": None if parts.base is None else {"file": parts.base.name, "sha256": parts.base_sha256},
        "versions": {
            "ditune": ditune.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_lightning": pl.__version__,
        },
        "threads": torch.get_num_threads(),
    }


def write_result(trainer: pl.Trainer, folder: Path, result: dict[str, Any]) -> None:
    if trainer.is_global_zero:
        write_json(folder / "result.json", result)


def finish(
    cfg: DictConfig,
    parts: Parts,
    module: GenerativeModule,
    trainer: pl.Trainer,
    comparison: Comparison | None,
    held_out: Pictures | None,
    result: dict[str, Any],
) -> None:
    """Save what was trained, then judge it and the base by the same protocol."""
    folder, base = Path(cfg.paths.output_dir), base_to_compare(parts)
    parts.network.to(trainer.strategy.root_device)  # Lightning has put it back on the CPU
    with module.ema.applied():
        start = time.perf_counter()
        save_trained(cfg, parts, folder, trainer.global_step)
        if parts.base is not None:
            result["adapter_bytes"] = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        result["denoising"] = {} if held_out is None else denoising(cfg, parts, held_out)
        result["metrics"] = {} if comparison is None else comparison(parts.network, base, folder / "samples")
        result["seconds"]["evaluation"] = time.perf_counter() - start
    result["status"] = "finished"
    summarise(result, folder)
    after = result["metrics"].get("after", {})
    for logger in trainer.loggers:
        if after:
            logger.log_metrics({f"eval/{key}": value for key, value in after.items()}, step=trainer.global_step)
        if isinstance(logger, WandbRun):
            logger.finish_training(folder)


def summarise(result: dict[str, Any], folder: Path) -> None:
    """The outcome in the log's last lines."""
    before, after = (result["metrics"].get(which, {}) for which in ("before", "after"))
    for name, values in (
        ("loss on held-out images", result["denoising"]),
        *(
            (key, {"before": before.get(key), "after": value})
            for key, value in after.items()
            if key.startswith(("kid", "fid", "fd")) and not key.endswith("_std")
        ),
    ):
        known = [f"{values[which]:.4f} {which}" for which in ("before", "after") if values.get(which) is not None]
        if known:
            log.info("%s: %s", name, ", ".join(known))
    log.info("everything of this run is in %s", folder)


def base_to_compare(parts: Parts) -> Path | None:
    """The base that the trained network is compared with: one of another shape is no better or worse than it."""
    return None if parts.reshaped else parts.base


def held_out_images(cfg: DictConfig) -> Pictures | None:
    """Images that are not trained on, for the loss on them; None where the data has no such split."""
    try:
        return make(cfg.data.pictures, "data", split=cfg.metrics.loss_split)
    except UserError as error:
        log.info("no loss on held-out images: %s", error)
        return None


def denoising(cfg: DictConfig, parts: Parts, pictures: Pictures) -> dict[str, float]:
    """Loss on held-out images after the training, and of the base before it."""
    networks = {"after": parts.network.eval()}
    if base_to_compare(parts) is not None:
        before = load_network(parts.base, parts.network.config, **parts.objective.process.network)
        networks["before"] = before.to(next(parts.network.parameters()).device).eval()
    return {
        name: denoising_loss(network, parts.objective, parts.autoencoder, pictures, cfg.metrics.seed, uses_bf16(cfg))
        for name, network in networks.items()
    }


def save_trained(cfg: DictConfig, parts: Parts, folder: Path, steps: int) -> None:
    common = {
        "class_names": parts.pictures.class_names,
        "autoencoder": parts.autoencoder.latent_fingerprint,
        "autoencoder_name": parts.autoencoder.name,
        "data": parts.pictures.fingerprint,
        "resolution": cfg.data.resolution,
        "steps": steps,
    }
    process = parts.objective.process.config
    if parts.base is None:
        save_network(folder / "network.safetensors", parts.network, process, **common)
        return
    base = {"file": parts.base.name, "sha256": parts.base_sha256, "network": parts.base_config, "classes": cfg.classes}
    save_adapter(parts.network, folder / "adapter", base=base, process=process, **common)
