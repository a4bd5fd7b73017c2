"""From a composed config to the parts of a run. The groups meet only here, so their contradictions show here."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ditune.autoencoders import Autoencoder
from ditune.checkpoints import load_network, read_header, sha256
from ditune.data import Pictures
from ditune.drawing import Drawer
from ditune.errors import UserError
from ditune.evaluation import Evaluation
from ditune.networks import DiT
from ditune.objectives import GaussianDiffusion
from ditune.peft import PeftMethod


@dataclass
class Parts:
    """What a run is made of."""

    pictures: Pictures
    autoencoder: Autoencoder
    network: DiT  # with the method applied to it
    method: PeftMethod
    objective: GaussianDiffusion
    base: Path | None  # file of the pretrained network; None = the network starts from scratch
    base_sha256: str | None


def make(config: DictConfig | None, what: str, **kwargs: object):
    """Instantiate one group of the config; its mistakes become one sentence that names the group."""
    try:
        built = instantiate(config, **kwargs)
        if isinstance(built, partial):
            inspect.signature(built.func).bind_partial(**built.keywords)  # its unknown keys would show only when called
        return built
    except (InstantiationException, TypeError) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        reason = str(cause or error).splitlines()[0]
        raise UserError(
            f"The config group '{what}' cannot be built: {reason}. See the comments in configs/{what}/ for its keys."
        ) from error


def build_parts(cfg: DictConfig) -> Parts:
    """Pictures, codec, network, method and objective of a config, checked against each other and the base network.

    Raises:
        UserError: something is missing or does not fit.
    """
    missing = missing_keys(OmegaConf.to_container(cfg))
    if missing:
        raise UserError(
            f"The config has no value for {', '.join(missing)}. Set it on the command line: {missing[0]}=..."
        )
    pictures = make(cfg.data.pictures, "data")
    autoencoder = make(cfg.autoencoder, "autoencoder")
    objective = make(cfg.objective, "objective")
    method = make(cfg.peft, "peft")
    network, base = build_network(cfg, pictures.class_names, autoencoder, objective)
    method.apply(network)
    if uses_bf16(cfg):
        freeze_in_bf16(network)
    network.gradient_checkpointing = cfg.gradient_checkpointing
    return Parts(pictures, autoencoder, network, method, objective, base, sha256(base) if base else None)


def missing_keys(values: object, path: str = "") -> list[str]:
    """Dotted names of the keys that are still ???; OmegaConf's own search fails at references to them."""
    if isinstance(values, dict):
        return [name for key, value in values.items() for name in missing_keys(value, f"{path}.{key}".lstrip("."))]
    return [path] if values == "???" else []


def build_network(
    cfg: DictConfig, class_names: list[str], autoencoder: Autoencoder, objective: GaussianDiffusion
) -> tuple[DiT, Path | None]:
    """The network of the config, from its pretrained file where one is named, else from seeded initial weights."""
    channels, side, _ = autoencoder.latent_shape(cfg.data.resolution)
    shape = {"in_channels": channels, "input_size": side, "num_classes": len(class_names)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        network = make(cfg.network, "network", **shape)
    if cfg.pretrained is None:
        return network, None
    base = Path(cfg.pretrained)
    loaded = load_network(base)
    if loaded.num_classes != len(class_names):
        raise UserError(
            f"The base network {base.name} knows {loaded.num_classes} classes, the data has {len(class_names)}. "
            "Give data with the base's classes (data.classes), or train without a base (pretrained=null peft=full)."
        )
    different = _differences(loaded.config, network.config)
    if different:
        raise UserError(f"The base network {base.name} is another than network=: {different}. Choose its network=.")
    if base.suffix == ".safetensors":
        _check_base(base, class_names, autoencoder, objective)
    return loaded, base


def _check_base(base: Path, class_names: list[str], autoencoder: Autoencoder, objective: GaussianDiffusion) -> None:
    header = read_header(base)
    different = _differences(header["process"], objective.process.config)
    if different:
        raise UserError(
            f"The base network {base.name} was trained on another process: {different}. Set objective.* as there."
        )
    provenance = header["provenance"]
    if provenance["autoencoder"] != autoencoder.fingerprint:
        raise UserError(f"The base network {base.name} was trained on other latents. Choose its autoencoder=.")
    if provenance["class_names"] != class_names:
        raise UserError(
            f"The classes of the data have other names than those of the base network {base.name}. "
            "Name the same classes in the same order (data.classes)."
        )


def _differences(theirs: Mapping, ours: Mapping) -> str:
    keys = [key for key in theirs if theirs[key] != ours.get(key)]
    return ", ".join(f"{key} {theirs[key]} there, {ours.get(key)} here" for key in keys)


def freeze_in_bf16(network: DiT) -> None:
    """Keep frozen weights in bf16, as autocast would round them in every step; what trains stays in fp32.

    Trainable parameters in bf16 would lose AdamW's small updates.
    """
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def uses_bf16(cfg: DictConfig) -> bool:
    return str(cfg.trainer.precision).startswith("bf16")


def build_drawer(cfg: DictConfig, parts: Parts, sampler: DictConfig | None = None) -> Drawer:
    """How the run's pictures are drawn, by the config's sampler or another."""
    sampler = cfg.sampler if sampler is None else sampler
    return Drawer(
        process=parts.objective.process,
        autoencoder=parts.autoencoder,
        resolution=cfg.data.resolution,
        bf16=uses_bf16(cfg),
        **make(sampler, "sampler"),
    )


def build_evaluation(
    cfg: DictConfig, drawer: Drawer, reference: Pictures, judge: object | None = None, store: Path | None = None
) -> Evaluation:
    """The fixed protocol of the config's metrics, against a reference; a `judge` may be shared."""
    judge = judge or make(cfg.metrics.judge, "metrics")
    return Evaluation(judge, reference, drawer, n=cfg.metrics.n, seed=cfg.metrics.seed, store=store)


def plain(cfg: DictConfig) -> dict:
    """The config as plain values with everything resolved."""
    return OmegaConf.to_container(cfg, resolve=True)
