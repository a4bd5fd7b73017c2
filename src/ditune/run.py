"""What a training left behind, ready to draw from: a run folder, or a bare network file."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ditune import samplers
from ditune.autoencoders import Autoencoder
from ditune.checkpoints import (
    NetworkFile,
    check_file,
    load_adapter,
    load_network,
    locate,
    read_adapter,
    read_header,
    read_network,
)
from ditune.checkpoints.sums import apply_sum, read_terms
from ditune.config.base_network import check_latents, given_process
from ditune.config.guides import build_sampling, needs_base
from ditune.config.instantiate import instantiate, refuse_strangers
from ditune.errors import UserError
from ditune.generation.generator import ImageGenerator
from ditune.networks import DiT
from ditune.networks.dit import inputs_of
from ditune.networks.int8 import quantise
from ditune.processes import GaussianProcess, build_process
from ditune.samplers import Cache

log = logging.getLogger(__name__)

STORED = ("process", "autoencoder", "resolution", "class_names")  # what a file must say about itself
BUILT = ("autoencoder", "sampler", "cache", "metrics")  # groups of a run folder's config from which objects are built
OURS = {"guidance": 1.5}  # of sampling, where no authors say otherwise


@dataclass(frozen=True)
class Trained:
    """A network (in evaluation mode, fp32) and how its images are generated."""

    network: DiT
    generator: ImageGenerator
    class_names: list[str] | None  # None: an official file, which does not name its classes

    @property
    def drawer(self) -> ImageGenerator:
        """The earlier name of `generator`."""
        return self.generator


@dataclass(frozen=True)
class Run(Trained):
    """A finished run: the EMA of what it trained, on its base where it has one."""

    folder: Path
    cfg: DictConfig
    base: Path | None
    reshaped: bool  # whether it has other classes than the base, or another resolution


def load_run(
    folder: Path | str, strength: float | None = None, keep_base: bool = False, as_trained: bool = True
) -> Run:
    """The network of a run folder, with the run's own autoencoder and sampler.

    Args:
        folder: of the run.
        strength: of its adapter, 0 = the base and 1 = the adapter, see `ditune.peft.dial`; None = 1.
        keep_base: keep what guides and `network.adaptation.dial` need of the base; the run's own guide keeps it anyway.
        as_trained: with frozen_weights=int8, frozen weights are rounded as in the training; else they are the base's.

    Raises:
        UserError: the run is not there, has not finished or is damaged; its base network is missing or another one; its
            method has no such strength; or its config would call what is none of our classes.
    """
    folder = Path(folder).expanduser()
    cfg = read_config(folder)
    refuse_strangers(cfg, BUILT, folder / "config.yaml")
    if (folder / "adapter").is_dir():
        base = locate(cfg.pretrained, Path(cfg.paths.cache_dir) / "networks")
        kept = keep_base or strength is not None or needs_base(cfg.sampler)
        network, stored = _load_adapted(folder / "adapter", base, kept)
        if as_trained and cfg.get("frozen_weights") == "int8":
            quantise(network)
        if strength is not None:
            network.adaptation.dial.set(strength)
    elif (folder / "network.safetensors").is_file():
        base = None
        if strength is not None or keep_base or needs_base(cfg.sampler):
            raise UserError(
                f"The run {folder} was trained from scratch, so it has no base network. Leave strength= out and set "
                "guide=null_class or checkpoint."
            )
        path = folder / "network.safetensors"
        network, stored = load_network(path), _stored(path, read_header(path))
    else:
        raise UserError(
            f"The run {folder} has saved no network yet. "
            f"Let it finish: python src/train.py with its settings, run_dir={folder} and resume=auto."
        )
    bf16 = str(cfg.trainer.precision).startswith("bf16")
    cache = instantiate(cfg.get("cache"), "cache")
    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    generator = build_generator(folder, stored, autoencoder, cfg.sampler, bf16, cfg.paths.cache_dir, cache)
    reshaped = base is not None and (stored["base"].get("classes") or stored["base"]["network"] != stored["network"])
    return Run(network.eval(), generator, stored["class_names"], folder, cfg, base, bool(reshaped))


def load_sum(weights: Mapping[str | Path, float]) -> Run:
    """The sum of several runs' adapters on their one base: theta_0 + sum_i w_i (theta_i - theta_0).

    Args:
        weights: w_i by run folder. Sampler and data are those of the first run.

    Raises:
        UserError: a run is missing or damaged; or the adapters cannot be added up, see `ditune.checkpoints.sums`.
    """
    folders = {Path(folder).expanduser(): weight for folder, weight in weights.items()}
    for folder in folders:
        if not (folder / "adapter").is_dir():
            raise UserError(f"{folder} is no run with an adapter. Give adapters=[<run>:0.7,<run>:0.3].")
    terms = read_terms({folder / "adapter": weight for folder, weight in folders.items()})
    run = load_run(next(iter(folders)), strength=0, as_trained=False)
    apply_sum(run.network, terms)
    return replace(run, network=run.network.eval())


def load_checkpoint(
    path: Path | str,
    autoencoder: DictConfig,
    sampler: DictConfig,
    bf16: bool,
    process: str | DictConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Trained:
    """A bare network: a file of ours or of another format that `load_network` knows.

    Args:
        autoencoder, sampler: config groups; the autoencoder must be the one that the network was trained with. Where
            the sampler leaves steps or guidance out (sampler=published), it is as the file's authors draw.
        bf16: the network runs under bf16 autocast.
        process: what a file of others was trained on, see `read_network`; None = as it says, else as DiT.
        overrides: constructor arguments that a file of others does not tell; those that are None are left out.

    Raises:
        UserError: the file is missing or damaged, or the autoencoder is another.
    """
    path, autoencoder = Path(path), instantiate(autoencoder, "autoencoder")
    if needs_base(sampler):
        raise UserError(
            f"sampler.guide is {sampler.guide}, and {path} is a network without an adapter that could be taken out. "
            "Give run=<run>, or set sampler.guide=null_class or checkpoint."
        )
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    read = read_network(path, given_process(process, "process"), **given)
    network = read.network
    stored = _official(path, read, autoencoder) if read.header is None else _stored(path, read.header)
    if None in (sampler.steps, sampler.guidance):
        theirs = OURS | read.sampling
        sampler = OmegaConf.merge(sampler, {key: value for key, value in theirs.items() if sampler[key] is None})
    generator = build_generator(path, stored, autoencoder, sampler, bf16, path.parent)
    if read.header is None:
        scales = ", ".join(f"{scale:g}" for scale in sorted(set(autoencoder.scale.tolist())))
        log.info(
            "its latents are those of autoencoder=%s times %s; where nothing else is set, it is sampled by %s with %d "
            "steps and guidance %g",
            autoencoder.name,
            scales,
            generator.sampler.kind,
            generator.steps,
            generator.guidance,
        )
    return Trained(network.eval(), generator, stored["class_names"])


def load_adapted(
    base: Path | str, adapter: Path | str, autoencoder: DictConfig, sampler: DictConfig, bf16: bool
) -> Trained:
    """A base network with an adapter of ours, which says its process, classes and resolution.

    Args:
        base: network file; by its hash it must be the one that the adapter was trained on.
        adapter: folder of the adapter.
        autoencoder, sampler, bf16: as of `load_checkpoint`.

    Raises:
        UserError: a file is missing or damaged, does not fit, or is no adapter that says these facts.
    """
    network, stored = _load_adapted(Path(adapter), Path(base), keep_base=False)
    if None in (sampler.steps, sampler.guidance):
        sampler = OmegaConf.merge(sampler, {key: value for key, value in OURS.items() if sampler[key] is None})
    generator = build_generator(
        Path(adapter), stored, instantiate(autoencoder, "autoencoder"), sampler, bf16, Path(base).parent
    )
    return Trained(network.eval(), generator, stored["class_names"])


def read_config(folder: Path) -> DictConfig:
    """The config of a run folder, as it stands there: nothing is built.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml. Give a folder in logs/train/runs/.")
    try:
        cfg = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"The config {path} is damaged ({error}). Copy it again.") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"The config {path} is damaged: it holds no keys. Copy it again.")
    return cfg


def _load_adapted(folder: Path, base: Path, keep_base: bool) -> tuple[DiT, dict[str, Any]]:
    config, _ = read_adapter(folder)
    missing = [key for key in (*STORED, "network") if key not in config]
    if missing:
        raise UserError(
            f"The adapter in {folder} does not say its {', '.join(missing)}. Give one that src/train.py has saved."
        )
    if not base.exists():
        raise UserError(
            f"The run's base network {base} is missing. Put it back, or correct `pretrained` in the run's config.yaml."
        )
    check_file(base, config, folder)
    resolution = {key: config["network"][key] for key in ("input_size", "pos_embed_scale")}
    known = (config.get("base") or {}).get("network") or config["network"]
    network = load_network(base, known, **resolution, **inputs_of(config["network"]))
    load_adapter(network, folder, keep_base)
    return network, config


def _stored(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    stored = header["provenance"] | {"process": header["process"]}
    missing = [key for key in STORED if key not in stored]
    if missing:
        raise UserError(f"{path} does not say its {', '.join(missing)}. Give a network that src/train.py has saved.")
    return stored


def _official(path: Path, read: NetworkFile, autoencoder: Autoencoder) -> dict[str, Any]:
    """What files of others leave unsaid: latents that only their channels tell apart, and names of classes."""
    network = read.network
    if network.in_channels != autoencoder.channels:
        raise UserError(
            f"{path} draws latents of {network.in_channels} channels, the autoencoder has {autoencoder.channels}. "
            "Official DiT files need the decoder of their latents (the VAE of Stable Diffusion) as autoencoder=."
        )
    return {
        "process": read.process or GaussianProcess().config,
        "autoencoder": autoencoder.latent_fingerprint,
        "resolution": network.config["input_size"] * autoencoder.downsample,
        "class_names": None,
    }


def build_generator(
    source: Path,
    stored: dict[str, Any],
    autoencoder: Autoencoder,
    sampler: DictConfig,
    bf16: bool,
    cache_dir: Path | str,
    cache: Cache | None = None,
) -> ImageGenerator:
    """How images of a network are generated.

    Args:
        source: file or folder of the network, for messages.
        stored: what it says of its process, autoencoder and resolution.
        autoencoder: must be the one that the network was trained with.
        sampler: config group.
        bf16: the network runs under bf16 autocast.
        cache_dir: where files of addresses are kept.
        cache: of the sampler's steps; None = none.

    Raises:
        UserError: the autoencoder is another, or sampler, process and cache do not fit together.
    """
    check_latents(f"network of {source}", stored, autoencoder)
    process = build_process(stored["process"])
    drawing = build_sampling(sampler, cache_dir)
    if isinstance(drawing["sampler"], str):
        drawing["sampler"] = getattr(samplers, drawing["sampler"])()
    generator = ImageGenerator(process, autoencoder, stored["resolution"], bf16=bf16, cache=cache, **drawing)
    samplers.check(generator.sampler, process, generator.steps, cache, generator.guide)
    return generator


def __getattr__(name: str) -> Any:
    """`load_experts`, which has moved and needs this module."""
    if name == "load_experts":
        return import_module("ditune.run_experts").load_experts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
