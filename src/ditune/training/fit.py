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
from ditune.build import Parts, build_drawer, build_parts, make, plain, uses_bf16
from ditune.checkpoints import load_network, read_json, save_adapter, save_network, write_json
from ditune.cli import in_sweep
from ditune.data.stream import PictureStream, micro_batch_size
from ditune.denoising import denoising_loss
from ditune.errors import UserError
from ditune.judging import Comparison, build_comparison
from ditune.peft import Full
from ditune.preparing import ensure, training_source

from .callbacks import peak_memory_mib
from .loggers import close_loggers
from .module import GenerativeModule
from .plan import announce, counts
from .setup import Resumed, StreamData, build_module, build_trainer, find_checkpoint, identity, open_loggers

log = logging.getLogger(__name__)

PRECISIONS = ("bf16-mixed", "32-true")


def train(cfg: DictConfig) -> int:
    """Train, draw, evaluate and save into the run folder; returns the exit code of the process.

    Raises:
        UserError: the config or a file is wrong.
    """
    torch.set_flush_denormal(True)  # every result in docs/results was made with it; no speed was gained by it
    folder = Path(cfg.paths.output_dir)
    if not cfg.dry_run:
        ensure(cfg)
    parts = build_parts(cfg)
    check_combination(cfg, parts)
    trainer, clock, stop = build_trainer(cfg, parts, folder)
    check_processes(cfg, trainer)
    marks = identity(cfg, parts)
    resumed = find_checkpoint(cfg, folder, marks)
    module = build_module(cfg, parts, marks)
    if trainer.is_global_zero:
        announce(cfg, parts, trainer, folder)
    if cfg.dry_run:
        return 0
    judged = trainer.is_global_zero and cfg.metrics.n > 0
    comparison = build_comparison(cfg, build_drawer(cfg, parts)) if judged else None
    source = training_source(cfg, parts.pictures, parts.autoencoder)
    stream = PictureStream(source, cfg.seed, cfg.data.flip)
    result = {"status": "running", **describe(cfg, parts)}
    before = earlier_seconds(folder, resumed)
    write_result(trainer, folder, result)
    start = time.perf_counter()
    try:
        open_loggers(cfg, trainer, folder, resumed.step)
        if cfg.compile:
            module.network.compile_blocks()
        trainer.fit(module, datamodule=StreamData(stream, cfg), ckpt_path=resumed.path, weights_only=True)
        steps = trainer.global_step - resumed.step
        result |= {
            "status": "stopped" if trainer.global_step < cfg.max_steps else "trained",
            "steps": trainer.global_step,
            "seconds": {"fit": before + time.perf_counter() - start},
            "images_per_second": steps * cfg.batch_size / clock.seconds if steps else None,
            "peak_memory_mib": peak_memory_mib(trainer.strategy.root_device),
        }
        if result["status"] == "trained" and trainer.is_global_zero:
            finish(cfg, parts, module, trainer, comparison, result)
    except BaseException as error:
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
    if cfg.trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision is {cfg.trainer.precision}, but what trains must stay in fp32. "
            f"Set one of {', '.join(PRECISIONS)}."
        )
    if parts.network.config["class_dropout_prob"] <= 0 < cfg.objective.label_drop:
        raise UserError(
            "The network has no null class for dropped labels. "
            "Set objective.label_drop=0, or network.class_dropout_prob above 0."
        )


def check_processes(cfg: DictConfig, trainer: pl.Trainer) -> None:
    """Refuse a batch that cannot be shared, and sweeps whose processes would start sweeps of their own."""
    micro_batch_size(cfg.batch_size, trainer.accumulate_grad_batches, trainer.world_size)
    if in_sweep() and trainer.world_size > 1:
        raise UserError(
            "A sweep (-m) runs its jobs in one process and cannot start several for each. "
            "Set trainer.devices=1, or start the jobs one by one."
        )


def earlier_seconds(folder: Path, resumed: Resumed) -> float:
    """Seconds of training that a resumed run has behind it."""
    path = folder / "result.json"
    if resumed.path is None or not path.is_file():
        return 0.0
    return read_json(path).get("seconds", {}).get("fit", 0.0)


def describe(cfg: DictConfig, parts: Parts) -> dict[str, Any]:
    trainable, total = counts(parts.network)
    return {
        "name": cfg.name,
        "method": type(parts.method).__name__,
        "peft": {key: value for key, value in plain(cfg.peft).items() if key != "_target_"},
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "batch_size": cfg.batch_size,
        "max_steps": cfg.max_steps,
        "lr": cfg.optimizer.lr,
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
    result: dict[str, Any],
) -> None:
    """Save what was trained, then judge it and the base by the same protocol."""
    folder = Path(cfg.paths.output_dir)
    parts.network.to(trainer.strategy.root_device)  # Lightning has put it back on the CPU
    with module.ema.applied():
        start = time.perf_counter()
        save_trained(cfg, parts, folder)
        result["denoising"] = denoising(cfg, parts)
        result["metrics"] = {} if comparison is None else comparison(parts.network, parts.base, folder / "samples")
        result["seconds"]["evaluation"] = time.perf_counter() - start
    result["status"] = "finished"
    after = result["metrics"].get("after", {})
    for logger in trainer.loggers if after else ():
        logger.log_metrics({f"eval/{key}": value for key, value in after.items()}, step=cfg.max_steps)


def denoising(cfg: DictConfig, parts: Parts) -> dict[str, float]:
    """Loss on the test split after the training, and of the base before it; nothing where there is no such split."""
    try:
        pictures = make(cfg.data.pictures, "data", split="test")
    except UserError as error:
        log.info("no loss on a test split: %s", error)
        return {}
    networks = {"after": parts.network.eval()}
    if parts.base is not None:
        networks["before"] = load_network(parts.base).to(next(parts.network.parameters()).device).eval()
    return {
        name: denoising_loss(network, parts.objective, parts.autoencoder, pictures, cfg.metrics.seed, uses_bf16(cfg))
        for name, network in networks.items()
    }


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
