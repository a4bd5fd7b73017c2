"""What a run, a bare network or a folder of pictures is worth, by the protocol of a config."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from ditune.build import build_evaluation, make
from ditune.checkpoints import load_network, read_json, sha256, write_json
from ditune.data import Pictures
from ditune.drawing import Drawer
from ditune.errors import UserError
from ditune.evaluation import Evaluation, Record, gap, judge_pictures
from ditune.run import Trained, best_device, exactly_one, load_checkpoint, load_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """A trained network against its base, by one protocol.

    Args:
        evaluation: distance to the domain that was trained on.
        own: distance to the base's own domain; None = the gap between the domains is not asked for.
        record: values of the base that are known.
    """

    evaluation: Evaluation
    own: Evaluation | None
    record: Record

    def __call__(self, network: nn.Module, base: Path | None, folder: Path) -> dict[str, Any]:
        """Metrics after the training; and where there is a base, of the base before it, and how far the gap closed.

        Args:
            network: with what was trained.
            base: file of the network that the training began with.
            folder: gets grid.png and nearest.png.
        """
        metrics: dict[str, Any] = {"protocol": self.evaluation.protocol, "after": self.evaluation(network, folder)}
        if base is None:
            return metrics

        def load() -> nn.Module:
            return load_network(base, **self.evaluation.drawer.process.network).to(next(network.parameters()).device)

        metrics["before"], metrics["before_is"] = self.record.or_measure(base, self.evaluation, load)
        if self.own is not None:
            metrics["base_domain"], metrics["base_domain_is"] = self.record.or_measure(base, self.own, load)
            key = f"kid_{self.evaluation.judge.extractor.name}"
            metrics |= gap(metrics["before"][key], metrics["after"][key], metrics["base_domain"][key])
        return metrics


def build_comparison(cfg: DictConfig, drawer: Drawer) -> Comparison:
    """The protocol of a run's `metrics`; built before a training, so that what is missing shows before it."""
    evaluation = build_evaluation(cfg, drawer, make(cfg.metrics.reference, "metrics"))
    own = None
    if cfg.metrics.base_reference is not None:
        own = build_evaluation(cfg, drawer, make(cfg.metrics.base_reference, "metrics"), judge=evaluation.judge)
    return Comparison(evaluation, own, Record(cfg.metrics.record))


def evaluate(cfg: DictConfig) -> Path:
    """Judge what the config names; returns the result.json that holds the values.

    Raises:
        UserError: the settings or a file are wrong.
    """
    source = exactly_one(cfg, "run", "checkpoint", "images")
    if cfg.record is not None and source != "checkpoint":
        raise UserError(f"A record holds values of bare networks, not of {source}=. Give checkpoint=, or no record=.")
    path, metrics = {"run": of_run, "checkpoint": of_checkpoint, "images": of_images}[source](cfg)
    Console().print(table(metrics))
    log.info("the values are in %s", path)
    return path


def of_run(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    run = load_run(cfg.run)
    if not run.cfg.metrics.n:
        raise UserError(f"The run {run.folder} was made with metrics.n=0. Set a number of pictures in its config.yaml.")
    path = run.folder / "result.json"
    result = read_json(path)
    network = run.network.to(best_device())
    metrics = build_comparison(run.cfg, run.drawer)(network, None if run.reshaped else run.base, run.folder / "samples")
    write_json(path, result | {"metrics": result.get("metrics", {}) | metrics})
    return path, metrics


def of_checkpoint(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    trained = load_checkpoint(cfg.checkpoint, cfg.autoencoder, cfg.sampler, cfg.bf16)
    reference = make(cfg.metrics.reference, "metrics")
    check_reference(trained, reference)
    record, folder = Record(cfg.record), Path(cfg.out)
    evaluation = build_evaluation(cfg, trained.drawer, reference)
    values = evaluation(trained.network.to(best_device()), folder)
    if cfg.record is not None:
        record.add(cfg.checkpoint, evaluation, values)
    metrics = {"protocol": evaluation.protocol, "values": values}
    facts = {"checkpoint": str(cfg.checkpoint), "sha256": sha256(cfg.checkpoint), "protocol_key": evaluation.key}
    write_json(folder / "result.json", facts | {"metrics": metrics})
    return folder / "result.json", metrics


def of_images(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    comparison, reference = make(cfg.metrics.judge, "metrics"), make(cfg.metrics.reference, "metrics")
    pictures, folder = Pictures(cfg.images, cfg.data.resolution), Path(cfg.out)
    values = judge_pictures(comparison, reference, pictures.load(), folder)
    protocol = {
        "n": len(pictures),
        "resolution": cfg.data.resolution,
        "reference": reference.fingerprint,
        "features": comparison.extractor.identity,
    }
    metrics = {"protocol": protocol, "values": values}
    facts = {"images": str(cfg.images), "fingerprint": pictures.fingerprint}
    write_json(folder / "result.json", facts | {"metrics": metrics})
    return folder / "result.json", metrics


def check_reference(trained: Trained, reference: Pictures) -> None:
    """The reference's labels are drawn, so they must mean the network's classes; and its pictures have one size.

    Raises:
        UserError: classes or resolution differ.
    """
    num_classes, resolution = trained.network.num_classes, trained.drawer.resolution
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
            f"The network draws pictures of {resolution} pixels, the reference has {reference.resolution}. "
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
    for key in metrics[columns[0]]:
        shown.add_row(key, *(number(metrics[name][key]) for name in columns))
    if "gap_closed" in metrics:
        shown.add_section()
        shown.add_row("share of the gap that closed", *("" for _ in columns[2:]), number(metrics["gap_closed"]))
    return shown


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
