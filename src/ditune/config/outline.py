"""A training from its config alone, with no file: for a plan before anything is fetched.

Classes and images are counted by the published tables, latents have the shape of the published autoencoders, and the
network lies on torch's meta device, which has shapes and no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import Tensor

from ditune.autoencoders import KL, Autoencoder
from ditune.checkpoints import published
from ditune.config import rules
from ditune.config.components import build_generator, build_objective, settings_of, store_frozen
from ditune.config.instantiate import instantiate, plain, training_images
from ditune.config.needs import needs_of, networks_folder
from ditune.data import Benchmark
from ditune.networks import DiT
from ditune.peft import PeftMethod
from ditune.processes import GaussianProcess
from ditune.training.components import Base, Components, Processes, Settings
from ditune.training.plan import saved_activations

DEPTHS = (2, 4)  # of the networks that memory is measured on; every block of a network saves equally much


@dataclass(frozen=True)
class ExpectedImages:
    """What is known of a dataset that is not here.

    Args:
        class_names: as many as there are classes; their names are not known yet.
        count: images of the split, by the published table.
    """

    class_names: list[str]
    count: int
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    def describe_classes(self) -> str:
        return f"{len(self.class_names):,} classes, as published"


class ExpectedAutoencoder(Autoencoder):
    """The shape of an autoencoder that is not here."""

    kind, moments = "expected", 2

    def __init__(self, name: str, channels: int, downsample: int) -> None:
        super().__init__(channels, downsample)
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("only its shape is known")

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError("only its shape is known")


@dataclass
class Outline:
    """A training as far as it is known without its files.

    Args:
        components: with a network on the meta device.
        build: (depth) -> a network of that depth, with the method applied to it, on the meta device.
        fused: whether the training's device has a fused kernel for attention.
    """

    components: Components
    build: Callable[[int], DiT]
    fused: bool = False

    @cached_property
    def per_sample(self) -> float:
        """Bytes that one sample saves for its backward, measured on two shallow networks."""
        c = self.components
        shape = c.autoencoder.latent_shape(c.settings.resolution)
        few, more = (
            saved_activations(self.build(depth), c.objective, shape, c.settings.bf16, self.fused) for depth in DEPTHS
        )
        per_block = (more - few) / (DEPTHS[1] - DEPTHS[0])
        return few + per_block * (c.network.config["depth"] - DEPTHS[0])


def outline(cfg: DictConfig, processes: Processes) -> Outline | None:
    """What the training of a config is made of; None if a missing file alone could say.

    Raises:
        UserError: the parts do not fit together.
    """
    images, autoencoder = expected_images(cfg), expected_autoencoder(cfg)
    base = expected_base(cfg)
    if images is None or autoencoder is None or (cfg.pretrained is not None and base is None):
        return None
    objective = build_objective(cfg)
    channels, side, _ = autoencoder.latent_shape(cfg.data.resolution)
    sizes = {"in_channels": channels, "input_size": side, "num_classes": len(images.class_names)}
    sizes |= objective.inputs
    if cfg.network.get("name") == "as_pretrained":
        cfg = cfg.copy()
        cfg.network = {"_target_": "ditune.networks.build_network", "name": published.NETWORKS[cfg.pretrained]}

    settings = settings_of(cfg)
    build = partial(_build, cfg, sizes, settings)
    method = instantiate(cfg.peft, "peft", _convert_="all")
    network = build(method)
    components = Components(
        images=images,
        autoencoder=autoencoder,
        network=network,
        method=method,
        objective=objective,
        base=base,
        balance=instantiate(cfg.balance, "balance"),
        settings=settings,
        sparsity=instantiate(cfg.get("sparsity"), "sparsity"),
        processes=processes,
    )
    for part in (rules.OF_THE_LABELS, rules.OF_A_TRAINING, rules.OF_THE_PROCESSES):
        rules.check(components, part)
    build_generator(cfg, components)  # refuses what its sampler cannot do

    def shallow(depth: int) -> DiT:
        return build(instantiate(cfg.peft, "peft", _convert_="all"), depth=depth)

    return Outline(
        components, shallow, fused=torch.cuda.is_available() or cfg.trainer.accelerator not in ("auto", "cpu")
    )


def _build(cfg: DictConfig, sizes: dict[str, Any], settings: Settings, method: PeftMethod, **more: Any) -> DiT:
    """The network of the config with the method applied to it; only shapes are asked."""
    with torch.device("meta"):
        network = instantiate(cfg.network, "network", **sizes, **more)
        method.apply(network)
    network.gradient_checkpointing = cfg.gradient_checkpointing
    store_frozen(network, settings)
    return network


def expected_images(cfg: DictConfig) -> Any:
    """The dataset if it is here, else what is published of it; None if nothing is."""
    cls = get_class(cfg.data.pictures._target_)
    if not issubclass(cls, Benchmark):
        known = all(need.present for need in needs_of(cfg, ["data"]))
        return training_images(cfg) if known else None
    root = Path(cfg.data.root).expanduser()
    if cls.find(root) is not None or cls.find_copy(root) is not None:
        return training_images(cfg)
    split = str(cfg.data.pictures.get("split") or "all").partition(".")[0]
    count = cls.published.get(split, cls.published.get("all"))
    if count is None:
        count = sum(value for key, value in cls.published.items() if key != "classes")
    limit = cfg.data.pictures.get("limit")
    count = round(min(count, limit or count) * (cfg.data.get("fraction") or 1))
    subset = cfg.data.get("subset") or {}
    count = min(count, subset.get("n", count)) // subset.get("clients", 1)
    return ExpectedImages([str(i) for i in range(cls.published["classes"])], count)


def expected_autoencoder(cfg: DictConfig) -> Autoencoder | None:
    """The autoencoder if it is here, else its shape; None if that is not known."""
    if get_class(cfg.autoencoder._target_) is not KL:
        return instantiate(cfg.autoencoder, "autoencoder")
    values = plain(cfg.autoencoder)
    shape = KL.shape(values)
    return None if shape is None else ExpectedAutoencoder(values["name"], *shape)


def expected_base(cfg: DictConfig) -> Base | None:
    """The pretrained file, of which only the published ones are known without reading."""
    if cfg.pretrained is None:
        return None
    path = published.path_of(cfg.pretrained, networks_folder(cfg))
    if cfg.pretrained not in published.PUBLISHED and not path.exists():
        return None
    process = GaussianProcess().config
    return Base(path, sha256="", config={}, process=process, header=None, reshaped=True, differences="")
