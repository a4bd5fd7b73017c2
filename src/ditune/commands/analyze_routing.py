"""How a trained network uses its experts while it generates (arXiv 2407.11633, section 4.3)."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ditune.commands.adapted import exactly_one
from ditune.config.hardware import bare_precision
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.files.atomic import write_json
from ditune.moe.plots import draw_by, draw_load
from ditune.moe.statistics import RoutingStatistics
from ditune.networks import DiTMoE
from ditune.processes import FlowProcess, Process
from ditune.run import load_checkpoint, load_run

log = logging.getLogger(__name__)


class Counted(nn.Module):
    """A network whose routing is counted in every call."""

    def __init__(self, network: DiTMoE, process: Process, statistics: RoutingStatistics):
        super().__init__()
        self.network, self.process, self.statistics = network, process, statistics
        self.num_classes = network.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *step: Tensor, **more: Tensor) -> Tensor:
        routing = []
        out = self.network(x, t, y, *step, **more, routing=routing)
        self.statistics.add(routing, part_of(self.process, t), y)
        return out


def part_of(process: Process, t: Tensor) -> Tensor:
    """Part of the process, 0 = data and 1 = noise, of the network's time input."""
    if isinstance(process, FlowProcess):
        part = t / process.time_scale
        return 1 - part if process.data_at else part
    return t / process.timesteps


def analyse(cfg: DictConfig) -> Path:
    """Generate `cfg.n` images, equally many of every class, and write what the experts did into `cfg.out`.

    Raises:
        UserError: the network has no experts, or the settings or a file are wrong.
    """
    source = exactly_one(cfg, "run", "checkpoint")
    bf16 = bare_precision(cfg.precision, cfg.bf16)
    trained = (
        load_run(cfg.run)
        if source == "run"
        else load_checkpoint(cfg.checkpoint, cfg.autoencoder, cfg.sampler, bf16, cfg.process, cfg.network_overrides)
    )
    network = trained.network.to(best_device())
    if not isinstance(network, DiTMoE):
        raise UserError(f"The network of {cfg[source]} has no experts. Give one that was trained with model=dit_moe.")
    generator = replace(
        trained.generator, batch_size=math.gcd(cfg.n, trained.generator.batch_size)
    )  # padding would be counted
    if cfg.steps is not None:
        generator = replace(generator, steps=cfg.steps)
    statistics = RoutingStatistics(network, best_device())
    labels = torch.arange(cfg.n) % network.num_classes
    generator.generate(Counted(network, generator.process, statistics).eval(), labels, cfg.seed)
    folder = (
        Path(cfg.out).expanduser() if cfg.out is not None else Path(cfg.run or cfg.paths.log_dir) / "routing_analysis"
    )
    draw_load(statistics, folder / "load.png")
    for name in statistics.counts:
        draw_by(statistics, name, folder / f"{name}.png")
    facts = {"layers": statistics.layers, "load": statistics.load_LE.tolist()}
    facts["unit_of_mutual_information"] = "nats"  # of mi_time, mi_position and mi_class
    facts |= {name: values.tolist() for name, values in statistics.per_layer().items()}
    write_json(
        folder / "routing.json", {"pictures": cfg.n, "steps": generator.steps, "guidance": generator.guidance, **facts}
    )
    log.info("load.png, time.png, position.png, class.png and routing.json are in %s", folder)
    return folder
