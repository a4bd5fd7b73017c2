"""One training, from its config to its run folder."""

import logging
import shlex
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ditune.checkpoints import load_network
from ditune.cli import in_sweep
from ditune.commands.preflight import preflight
from ditune.commands.prepare import held_out_images, held_out_source, training_source
from ditune.config import disk, rules
from ditune.config.components import build_comparison, build_components, build_generator
from ditune.config.grammar import hydra_value
from ditune.config.instantiate import instantiate, refuse_missing
from ditune.config.keys import check
from ditune.config.needs import without_secrets
from ditune.config.roles import job_hash, job_identity
from ditune.config.sharded import refuse_unspreadable
from ditune.config.training import build_module, build_outlook, build_trainer, open_loggers, processes_of, resume_key
from ditune.config.validation import build_validation, chosen_metric
from ditune.data.stream import ImageStream
from ditune.distributed import is_spread, leave_at_exit, take_first_ranks_weights
from ditune.evaluation.comparison import Comparison
from ditune.evaluation.denoising_loss import HeldOutLoss
from ditune.evaluation.held_out import HeldOut
from ditune.evaluation.protocol import Evaluation
from ditune.evaluation.shared_files import meet
from ditune.files.atomic import atomic, remove_leftovers
from ditune.generation.generator import ImageGenerator
from ditune.launch.run_folder import owned
from ditune.memory import memory_for
from ditune.progress import is_first_rank
from ditune.stopping import Signals, listen
from ditune.training import ranks
from ditune.training.base_samples import keep_base_samples
from ditune.training.callbacks import SampleGrids, StepGrids, Validation, peak_memory_mib
from ditune.training.checkpoint_io import remove_checkpoints
from ditune.training.components import Components
from ditune.training.loggers.wandb import WandbRun, close_loggers
from ditune.training.micro_batch import less_memory
from ditune.training.module import GenerativeModule
from ditune.training.outlook import Outlook
from ditune.training.plan import announce
from ditune.training.price import MEASURE, device_name, expected_pace, measured_pace, price
from ditune.training.result import RunRecord, describe, has_finished, save_trained, summarise
from ditune.training.resume import find_checkpoint
from ditune.training.source import StreamData

log = logging.getLogger(__name__)

STORE = "evaluation"  # in the run folder: generated images until their metrics are in result.json


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
    hashes = job_hash(cfg), job_identity(cfg)  # of what was asked for, before the machine decides
    if in_sweep() and has_finished(folder, *hashes):
        log.info("%s already holds the result of this config", folder)
        return 0
    if is_first_rank():
        remove_leftovers(folder)  # it is ours alone, so their writers are gone
    refuse_unspreadable(cfg)
    instantiate(cfg.logger, "logger")  # what it refuses shows before the data is prepared
    chosen_metric(cfg)  # likewise
    torch.set_flush_denormal(True)  # every result in docs/results was made with it; no speed was gained by it
    if not preflight(cfg, folder):
        return 0

    c = build_components(cfg)
    rules.check(c, rules.OF_A_TRAINING)
    generator, held_out = build_generator(cfg, c), held_out_images(cfg)
    outlook = build_outlook(cfg, c, generator, held_out)
    trainer, clock, stop = build_trainer(cfg, c, generator, folder, outlook, signals)
    if trainer.world_size > 1:
        leave_at_exit()
    c.processes = processes_of(trainer, in_sweep())
    rules.check(c, rules.OF_THE_PROCESSES)
    module = build_module(cfg, c, resume_key(cfg, c))
    resumed = find_checkpoint(folder, cfg.resume, cfg.max_steps, module, c.processes)
    module.begun_with = resumed.micro_batch

    first = trainer.is_global_zero
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / "config.yaml") as temporary:
            OmegaConf.save(without_secrets(cfg), temporary)
        spaces = disk.spaces(cfg, c, folder, [])
        config = OmegaConf.to_yaml(without_secrets(cfg), resolve=True) if cfg.verbose else None
        lines = {"disk": disk.line(spaces)}
        if cfg.dry_run:
            lines["price"] = plan_price(cfg, c, module, trainer, generator, outlook, folder)
        announce(c, trainer, folder, config, lines)
        for text in disk.shortage(spaces):
            log.warning("%s", text)
    if cfg.dry_run:
        return 0
    comparison = build_comparison(cfg, generator) if first and cfg.metrics.n > 0 else None
    if comparison is not None:
        outlook.evaluation_images = cfg.metrics.n * comparison.unknown(c.base_to_compare) // trainer.world_size
    outlook.held_out_calls //= trainer.world_size
    source = training_source(cfg, c.images, c.autoencoder)
    unseen = None if held_out is None else held_out_source(cfg, held_out, c.autoencoder)
    validation = build_validation(cfg, trainer, c, generator, unseen, comparison, resumed.step)
    if validation is not None:  # right behind the clock: it may make this step the last one
        trainer.callbacks.insert(trainer.callbacks.index(clock) + 1, validation)
    keep_base_samples(c, module, generator, trainer.strategy.root_device)
    stream = ImageStream(source, cfg.seed, cfg.data.flip, instantiate(cfg.augment, "augment"))
    data = StreamData(stream, cfg.batch_size, cfg.data.num_workers)
    module.names = lambda positions: [c.images.names[i] for i in stream.indices(positions)]

    close = partial(close_loggers, trainer)
    enough = memory_for("the training", lambda: less_memory(trainer, module))
    facts = describe(c, *hashes) | ({"steps": resumed.step} if resumed.step else {})
    with RunRecord(folder, facts, resumed.seconds, stop, trainer, first, close) as record, enough:
        open_loggers(cfg, trainer, folder, resumed.step, c)
        if cfg.compile:
            module.network.compile_blocks()
        trainer.fit(module, datamodule=data, ckpt_path=resumed.path, weights_only=True)
        record.trained(trainer, resumed.step, cfg.batch_size, clock.seconds)
        record.values["peak_memory_mib"] = peak_memory_mib(trainer.strategy.root_device)
        if module.routing:
            record.values["routing"] = module.routing
        if record.status == "trained":
            if trainer.global_step == resumed.step:
                make_up_grids(trainer, module)
            record.values["evaluated"] = take_weights(module, trainer, validation)
            with stop.at_once(trainer, record.values["evaluated"]["checkpoint"] == "last"):
                finish(cfg, c, module, trainer, comparison, unseen, record, folder)
    if first and record.status == "finished" and not cfg.callbacks.checkpoint.keep_finished:
        remove_checkpoints(folder / "checkpoints")  # result.json says already that nobody has to go on from them
    if stop.agreed and trainer.world_size > 1:
        ranks.leave_together(trainer)
    return record.exit_code


def plan_price(
    cfg: DictConfig,
    c: Components,
    module: GenerativeModule,
    trainer: pl.Trainer,
    generator: ImageGenerator,
    outlook: Outlook,
    folder: Path,
) -> str:
    """What the run will take, as a line of the plan; it is also written for the summary of a sweep."""
    if cfg.metrics.n > 0:  # of the base too, unless a record has its values
        recorded = c.base_to_compare is None or cfg.metrics.record is not None
        outlook.evaluation_images = cfg.metrics.n * (1 if recorded else 2) // trainer.world_size
    outlook.held_out_calls //= trainer.world_size
    if cfg.dry_run == MEASURE:
        evaluation = build_comparison(cfg, generator).evaluation if cfg.metrics.n > 0 else None
        source = training_source(cfg, c.images, c.autoencoder)
        stream = ImageStream(source, cfg.seed, cfg.data.flip, instantiate(cfg.augment, "augment"))
        pace = measured_pace(module, trainer, stream, generator, evaluation)
    else:
        pace = expected_pace(c, outlook.calls, device_name(trainer.strategy.root_device))
    expected = price(pace, outlook, trainer.world_size, cfg.price_per_hour)
    expected.write(folder)
    return expected.line()


def make_up_grids(trainer: pl.Trainer, module: GenerativeModule) -> None:
    """Generate the last grids of a training that was killed after its last step."""
    module.network.to(trainer.strategy.root_device)  # Lightning has put it back on the CPU
    for callback in trainer.callbacks:
        if isinstance(callback, SampleGrids | StepGrids):
            callback.make_up(trainer, module)


def take_weights(module: GenerativeModule, trainer: pl.Trainer, validation: Validation | None) -> dict[str, Any]:
    """Decide which weights are saved and evaluated, and give them to the module; returns what result.json says of it.

    They are an average (EMA): the best one where callbacks.checkpoint.best is set, else the last one.
    """
    ended = {}
    if validation is not None and validation.ended_at is not None:
        ended = {"ended_early_at": validation.ended_at}
    if validation is not None and validation.best is not None:
        taken = validation.best.take(module) if validation.best.found else None
        if taken is not None:
            return taken | ended
        log.warning("there are no best weights by val/%s: the last are saved and evaluated", validation.best.metric)
    return {"checkpoint": "last", "step": trainer.global_step} | ended


def finish(
    cfg: DictConfig,
    c: Components,
    module: GenerativeModule,
    trainer: pl.Trainer,
    comparison: Comparison | None,
    held_out: HeldOut | None,
    record: RunRecord,
    folder: Path,
) -> None:
    """Save what was trained, then evaluate it and the base by the same protocol; all ranks share the work.

    Args:
        comparison: of the first rank; the others build theirs now, since its extractor may be large.
    """
    values, first, device = record.values, trainer.is_global_zero, trainer.strategy.root_device
    evaluated = held_out is not None or cfg.metrics.n > 0
    spread = is_spread(c.network)
    c.network.to(device)  # Lightning has put it back on the CPU
    with module.ema.applied():
        start = time.perf_counter()
        if spread:
            c.network = trainer.strategy.put_together(module, everywhere=evaluated)
        if first:
            save_trained(c, folder, values["evaluated"]["step"])
        if not spread:
            take_first_ranks_weights(c.network)
        values["denoising"] = {} if held_out is None else denoising(c, held_out)
        together = trainer.world_size == 1 or (cfg.metrics.n > 0 and meet(folder, device))
        values["metrics"] = {}
        if cfg.metrics.n > 0 and (first or together):
            comparison = comparison or build_comparison(cfg, build_generator(cfg, c))
            compared = comparison.kept_in(folder / STORE if together else None)
            values["metrics"] = compared(c.network, c.base_to_compare, folder / "samples")
            if first and cfg.metrics.keep_images:
                keep_images(compared.evaluation, c.network, folder / "samples.npz")
        values["seconds"]["evaluation"] = time.perf_counter() - start
    if first:
        report(cfg, c, trainer, record, folder)


def keep_images(evaluation: Evaluation, network: nn.Module, path: Path) -> None:
    """Write the images that were evaluated as ADM's .npz."""
    if evaluation.store is None:
        log.warning("the images are not kept, since the machines of this training share no folder")
    else:
        evaluation.shards(network).save_npz(path)


def report(cfg: DictConfig, c: Components, trainer: pl.Trainer, record: RunRecord, folder: Path) -> None:
    """The outcome for people, loggers and the next start."""
    values = record.values
    if c.base is not None:
        values["adapter_bytes"] = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    values["status"] = "finished"
    record.write()
    if (folder / STORE).is_dir():
        shutil.rmtree(folder / STORE)  # the values are safe now
    summarise(values, folder)
    if not cfg.metrics.n:
        processes = max(trainer.world_size, torch.cuda.device_count())
        log.info("metrics.n=0: nothing was generated and compared. Later: %s", later(folder, processes))
    after = values["metrics"].get("after", {})
    for logger in trainer.loggers:
        if after:
            logger.log_metrics({f"eval/{key}": value for key, value in after.items()}, step=values["evaluated"]["step"])
        if isinstance(logger, WandbRun):
            logger.finish_training(folder)


def later(folder: Path, processes: int) -> str:
    """The command that evaluates a run which was trained with metrics.n=0."""
    metrics = HydraConfig.get().runtime.choices.get("metrics") if HydraConfig.initialized() else None
    run = shlex.quote(f"run={hydra_value(folder)}")
    return f"python src/evaluate.py {run} metrics_of=this metrics={metrics or 'fid'} processes={processes}"


def denoising(c: Components, held_out: HeldOut) -> dict[str, float]:
    """Loss on held-out images after the training, and of the base before it."""
    loss = HeldOutLoss(c.objective, held_out, c.settings.metrics_seed, c.settings.bf16)
    values = {"after": loss(c.network.eval())}
    if c.base_to_compare is not None:
        before = load_network(c.base_to_compare, c.network.config, **c.objective.process.network)
        values["before"] = loss(before.to(next(c.network.parameters()).device).eval())
    return values
