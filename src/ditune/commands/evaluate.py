"""Metrics of a run, a bare network or a folder of images, by the protocol of a config."""

import logging
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from ditune.checkpoints import locate
from ditune.commands.adapted import exactly_one, load_parts, load_weighted, ready, refuse_strength
from ditune.commands.evaluate_sweep import number_given
from ditune.config.components import build_comparison, build_evaluation
from ditune.config.guides import build_guide
from ditune.config.hardware import bare_precision, settle_numbers
from ditune.config.instantiate import instantiate
from ditune.config.keys import check
from ditune.config.references import reference_images
from ditune.data import ImageDataset
from ditune.distributed import best_device, rank, world_size
from ditune.errors import UserError
from ditune.evaluation.image_arrays import ArrayImages
from ditune.evaluation.image_files import ImageFiles
from ditune.evaluation.image_shards import ImageShards
from ditune.evaluation.protocol import Record, evaluate_images
from ditune.files.atomic import read_json, sha256, write_json
from ditune.generation.generator import ImageGenerator
from ditune.launch.run_folder import owned
from ditune.metrics import ImageSet, check_counts
from ditune.progress import console
from ditune.run import Trained, load_checkpoint

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> Path:
    """Evaluate what the config names; returns the result.json that holds the values.

    Of several processes (torchrun's environment) all generate, and the first one computes metrics and writes.

    Raises:
        UserError: the settings or a file are wrong.
    """
    check(cfg, "evaluate")
    source = exactly_one(cfg, *SOURCES)
    if cfg.record is not None and source not in ("checkpoint", "run"):
        raise UserError(
            f"A record holds values of network files, not of {source}=. Give checkpoint= or run=, or no record=."
        )
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # an evaluation of a run writes into its folder, as its training does
    folder = Path(cfg.run).expanduser() if source == "run" else None
    with owned(folder) if folder is not None and folder.is_dir() else nullcontext():
        path, metrics = SOURCES[source](cfg)
    if rank() == 0:
        console().print(table(metrics))
        log.info("the values are in %s", path)
    return path


def of_run(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """A run by its own protocol, or by another one besides: of other metrics, guidance or strength of the adapter."""
    run = load_weighted(cfg)
    path, settings = run.folder / "result.json", run.cfg
    generator = guided(run.generator, cfg)
    own = cfg.metrics_of == "run" and generator is run.generator and cfg.strength is None
    if cfg.metrics_of == "this":
        judge = OmegaConf.to_container(cfg.metrics.judge, resolve=True)
        asked = {"judge": judge, "n": cfg.metrics.n, "seed": cfg.metrics.seed, "record": None}
        asked["reference_split"] = cfg.metrics.get("reference_split")
        settings.metrics = OmegaConf.to_container(settings.metrics) | asked  # another judge has other keys
    elif cfg.metrics_of != "run":
        raise UserError(
            f"metrics_of is {cfg.metrics_of}. Set metrics_of=run for the run's metrics, or =this for metrics=."
        )
    elif not settings.metrics.n and number_given():
        settings.metrics.n = cfg.metrics.n
    if not settings.metrics.n:
        raise UserError(
            f"The run {run.folder} was made with metrics.n=0. Set metrics.n= to evaluate it by its own metrics, "
            "or metrics_of=this, and metrics= and metrics.n= of this command are taken."
        )
    if cfg.record is not None:
        settings.metrics.record = cfg.record
    settle_numbers(settings.trainer.precision, best_device().type)  # the protocol is the run's, emulated or not
    network, start = ready(run, cfg.compile), time.perf_counter()
    comparison = build_comparison(settings, generator, run.folder / "evaluation")
    metrics = comparison(network, None if run.reshaped else run.base, run.folder / "samples")
    if rank() != 0:
        return path, metrics
    if cfg.record is not None and not run.reshaped:
        comparison.note(run.base, metrics)
    speed = finish_shards(comparison.evaluation.shards(network), run.folder / "samples.npz", start)
    shutil.rmtree(run.folder / "evaluation")
    result = read_json(path) | {"evaluation": speed}
    if own:
        result["metrics"] = result.get("metrics", {}) | metrics
    else:
        key = comparison.evaluation.key
        if cfg.strength is not None:
            key, metrics["strength"] = f"{key}_strength_{cfg.strength:g}", cfg.strength
        result.setdefault("other_protocols", {})[key] = metrics
    write_json(path, result)
    return path, metrics


def guided(generator: ImageGenerator, cfg: DictConfig) -> ImageGenerator:
    """The generator with `guidance=` and `guide=` of the command; the same object where neither is given."""
    if cfg.guidance is not None:
        generator = replace(generator, guidance=cfg.guidance)
    if cfg.guide is not None:
        generator = replace(generator, guide=build_guide(cfg, cfg.paths.cache_dir))
    return generator


def of_adapters(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """The sum of several runs' adapters, by the sampler of the first run and the metrics of the command."""
    run = load_weighted(cfg)
    generator = guided(run.generator, cfg)
    facts = {"adapters": list(cfg.adapters)} | ({} if cfg.strength is None else {"strength": cfg.strength})
    return of_network(cfg, replace(run, generator=generator), facts)


def of_experts(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """Several runs, each in its part of the process, by the sampler of the first one and the metrics of the command."""
    trained = load_parts(cfg)
    generator = guided(trained.generator, cfg)
    return of_network(cfg, replace(trained, generator=generator), {"experts": generator.experts.settings})


def of_checkpoint(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """A network file."""
    refuse_strength(cfg)
    if cfg.guide is not None or cfg.guidance is not None:
        raise UserError("guide= and guidance= are not of checkpoint=. Set sampler.guide and sampler.guidance.")
    checkpoint = locate(cfg.checkpoint, f"{cfg.paths.cache_dir}/networks")
    bf16 = bare_precision(cfg.precision, cfg.bf16)
    given = (cfg.process, cfg.network_overrides)
    trained = load_checkpoint(checkpoint, cfg.autoencoder, cfg.sampler, bf16, *given)
    trained = replace(trained, generator=replace(trained.generator, cache=instantiate(cfg.cache, "cache")))
    return of_network(cfg, trained, {"checkpoint": str(cfg.checkpoint), "sha256": sha256(checkpoint)}, checkpoint)


def of_network(
    cfg: DictConfig, trained: Trained, facts: dict[str, Any], checkpoint: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """A network by the metrics of the command; `checkpoint` is its file, whose values go into the record."""
    reference = reference_images(cfg)
    check_reference(trained, reference)
    record, folder, start = Record(cfg.record), Path(cfg.out).expanduser(), time.perf_counter()
    evaluation = build_evaluation(cfg, trained.generator, reference, store=folder / "evaluation")
    network = ready(trained, cfg.compile)
    values = evaluation(network, folder)
    if rank() != 0:
        return folder / "result.json", {}
    speed = finish_shards(evaluation.shards(network), folder / "samples.npz", start)
    shutil.rmtree(folder / "evaluation")
    if cfg.record is not None and checkpoint is not None:
        record.add(checkpoint, evaluation, values)
    metrics = {"protocol": evaluation.protocol, "values": values}
    facts = facts | {"protocol_key": evaluation.key, "evaluation": speed, "metrics": metrics}
    write_json(folder / "result.json", facts)
    return folder / "result.json", metrics


def finish_shards(shards: ImageShards, path: Path, start: float) -> dict[str, float]:
    """Write the images as ADM's .npz; returns seconds and images per second of the evaluation."""
    seconds = time.perf_counter() - start
    log.info("%d images generated and evaluated in %.0f s, %.1f images/s", len(shards), seconds, len(shards) / seconds)
    shards.save_npz(path)
    return {"seconds": seconds, "images_per_second": len(shards) / seconds, "processes": world_size()}


def of_images(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """A folder or zip file of images."""
    images = ImageFiles(cfg.images, cfg.data.resolution)
    return of_set(cfg, images, {"images": str(cfg.images), **images.facts})


def of_npz(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """A file of numpy."""
    images = ArrayImages(cfg.npz)
    if images.resolution != cfg.data.resolution:
        raise UserError(
            f"The images in {cfg.npz} have {images.resolution} pixels, the reference {cfg.data.resolution}. "
            f"Set data.resolution={images.resolution}."
        )
    return of_set(cfg, images, {"npz": str(cfg.npz)})


def of_set(cfg: DictConfig, images: ImageSet, facts: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    suite, reference = instantiate(cfg.metrics.judge, "metrics"), reference_images(cfg)
    check_counts(len(images), len(reference))
    suite.extractor.to(best_device())
    folder = Path(cfg.out).expanduser()
    values = evaluate_images(suite, reference, images, folder)
    protocol = {
        "n": len(images),
        "resolution": cfg.data.resolution,
        "reference": reference.fingerprint,
        "features": suite.identity,
    }
    metrics = {"protocol": protocol, "values": values}
    write_json(folder / "result.json", facts | {"fingerprint": images.fingerprint, "metrics": metrics})
    return folder / "result.json", metrics


SOURCES = {
    "run": of_run,
    "adapters": of_adapters,
    "experts": of_experts,
    "checkpoint": of_checkpoint,
    "images": of_images,
    "npz": of_npz,
}


def check_reference(trained: Trained, reference: ImageDataset) -> None:
    """Refuse a reference whose classes or resolution are not the network's.

    Raises:
        UserError: classes or resolution differ.
    """
    num_classes, resolution = trained.network.num_classes, trained.generator.resolution
    if reference.num_classes != num_classes:
        raise UserError(
            f"The network knows {num_classes} classes, the reference has {reference.num_classes}. "
            "Choose data= (or metrics.reference) with the network's classes."
        )
    if trained.class_names not in (None, reference.class_names):
        raise UserError(
            "The reference's classes have other names than the network's. "
            "Choose data= (or metrics.reference) with the same classes in the same order."
        )
    if reference.resolution != resolution:
        raise UserError(
            f"The network generates images of {resolution} pixels, the reference has {reference.resolution}. "
            f"Set data.resolution={resolution}."
        )


def table(metrics: dict[str, Any]) -> Table:
    """Values in rows, what they belong to in columns; below them how far the gap closed."""
    columns = [name for name in ("before", "after", "base_domain", "values") if name in metrics]
    shown = Table(title=f"{metrics['protocol']['n']} pictures")
    shown.add_column("")
    for name in columns:
        origin = metrics.get(f"{name}_is")
        shown.add_column(name.replace("_", " ") + (f" ({origin})" if origin else ""), justify="right")
    for key in dict.fromkeys(key for name in columns for key in metrics[name]):
        # a record of an earlier version lacks what was added since
        shown.add_row(key, *(number(metrics[name][key]) if key in metrics[name] else "" for name in columns))
    if "gap_closed" in metrics:
        shown.add_section()
        shown.add_row("share of the gap that closed", *("" for _ in columns[2:]), number(metrics["gap_closed"]))
    return shown


def number(value: float) -> str:
    """Whole numbers with commas, others with four decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
