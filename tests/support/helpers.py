"""What several tests share: golden numbers, composed configs, runs and what they leave."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from ditune import cli
from ditune.checkpoints.source import Composed
from ditune.config.components import build_components
from ditune.config.grammar import hydra_value
from ditune.config.overrides import current
from ditune.config.trainings import is_of_trainings
from ditune.training.checkpoint_io import newest_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

# A training of seconds: 16-pixel pictures, two blocks of 32 channels, sheets of two pictures, nothing judged.
SMALL = [
    "~experiment",
    "network=tiny",
    "data=folder",
    "data.resolution=16",
    "objective.process.prediction=x0",
    "objective.process.variance=fixed_small",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "batch_size=4",
    "sampler.steps=2",
    "sampler.batch_size=2",
    "callbacks.samples.n=2",
    "metrics.n=0",
]
# The same by flow matching.
SMALL_FLOW = [override for override in SMALL if not override.startswith("objective.")] + ["objective=flow_matching"]


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def composed(tensors: Mapping[str, Tensor | Composed]) -> dict[str, Tensor]:
    """What a format's module makes of a file, with every tensor put together."""
    return {key: value.make() if isinstance(value, Composed) else value for key, value in tensors.items()}


def compose(folder: Path, *overrides: str) -> DictConfig:
    """The config of `train.py <overrides>` with `folder` as its run folder; nothing is run."""
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        return hydra.compose("train", [*overrides, f"paths.output_dir={hydra_value(folder)}"])


def task(name: str, *overrides: str) -> DictConfig:
    """The config of `<name>.py <overrides>`."""
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        return hydra.compose(name, list(overrides))


def compose_command(command: str, folder: Path) -> DictConfig:
    """The config of a documented command; of a sweep, that of its first job.

    Args:
        command: `python src/<name>.py <overrides>`.
        folder: replaces what the documentation writes as <run> or <folder>.
    """
    _, script, *arguments = shlex.split(re.sub(r"<[^<>]+>", str(folder), command))
    assert (ROOT / script).is_file(), script
    overrides = [re.sub(r"(=[^\[{,]*),.*", r"\1", argument) for argument in arguments if argument != "-m"]
    overrides = [current(override, Path(script).stem) for override in overrides]
    cli.prepare()
    configs = cli.REPORT_CONFIGS if "report" in script else cli.CONFIGS
    name = "prepare_training" if "prepare" in script and is_of_trainings(overrides) else Path(script).stem
    with hydra.initialize_config_dir(configs, version_base="1.3"):
        return hydra.compose(name, overrides)


def open_gates(network: nn.Module, std: float = 0.1) -> None:
    """Seeded values for all that a fresh network has as zeros: adaLN, the final layer, biases."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std, generator=generator)


def checkpoint(folder: Path) -> dict:
    """The newest checkpoint of a run."""
    path = newest_checkpoint(folder / "checkpoints")
    assert path is not None
    return torch.load(path, weights_only=True)


def movement(cfg: DictConfig, folder: Path) -> float:
    """How far a run's method has moved from its start, relative to its norm; the label table is not counted."""
    parts = build_components(cfg)
    trained = checkpoint(folder)["state_dict"]
    before = {k: v for k, v in parts.method.trainable(parts.network).items() if not k.startswith("y_embedder.")}
    start, end = (
        torch.cat([v.detach().flatten() for v in values])
        for values in (before.values(), (trained[f"network.{key}"] for key in before))
    )
    return ((end - start).norm() / start.norm()).item()


def assert_same_bits(a: object, b: object, where: str = "") -> None:
    """Equal nested dicts, lists and tensors, to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}/{i}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where
