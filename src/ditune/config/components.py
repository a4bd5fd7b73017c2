"""From a composed config to the parts of a run. The groups meet only here, so their contradictions show here."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ditune.autoencoders import Autoencoder
from ditune.checkpoints import locate, read_network
from ditune.config.grammar import literal, resolved
from ditune.data import Pictures
from ditune.errors import UserError
from ditune.evaluation.protocol import Evaluation
from ditune.files.atomic import sha256
from ditune.generation.generator import Drawer
from ditune.networks import DiT
from ditune.objectives import Objective
from ditune.peft import PeftMethod, adapt_labels
from ditune.processes import GaussianProcess, build_process
from ditune.rng import seeded
from ditune.samplers import check

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What a run is made of."""

    pictures: Pictures
    autoencoder: Autoencoder
    network: DiT  # with the method applied to it
    method: PeftMethod
    objective: Objective
    base: Path | None  # file of the pretrained network; None = the network starts from scratch
    base_sha256: str | None
    base_config: dict | None  # of the network in that file
    reshaped: bool  # whether the network has other classes than the base, or another resolution
    balance: object | None  # a ditune.training.Balance for networks with experts


def as_hydra_reads(config: DictConfig | None) -> DictConfig | None:
    """The config for `instantiate`, which resolves it and then reads it: paths with `${` must stand that twice."""
    return (
        OmegaConf.create(literal(OmegaConf.to_container(resolved(config))))
        if isinstance(config, DictConfig)
        else config
    )


def make(config: DictConfig | None, what: str, **kwargs: object):
    """Instantiate one group of the config; its mistakes become one sentence that names the group."""
    try:
        built = instantiate(as_hydra_reads(config), **kwargs)
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
    refuse_missing(cfg)
    pictures = make(cfg.data.pictures, "data")
    autoencoder = make(cfg.autoencoder, "autoencoder")
    objective = make(cfg.objective, "objective")
    method = make(cfg.peft, "peft", _convert_="all")
    network, base, base_config = build_network(cfg, pictures.class_names, autoencoder, objective)
    reshaped = cfg.classes is not None or base_config not in (None, network.config)
    if cfg.classes is not None and not (method.train_labels and base):
        raise UserError(
            "classes= makes a new label table of a pretrained one. Set pretrained= and peft.train_labels=true."
        )
    with seeded(cfg.seed):
        method.apply(network)
    if uses_bf16(cfg):
        freeze_in_bf16(network)
    network.gradient_checkpointing = cfg.gradient_checkpointing
    hashed = sha256(base) if base else None
    balance = make(cfg.balance, "balance")
    return Parts(pictures, autoencoder, network, method, objective, base, hashed, base_config, reshaped, balance)


def refuse_missing(cfg: DictConfig) -> None:
    """Raises UserError where a key that has no default has no value."""
    missing = missing_keys(OmegaConf.to_container(cfg))
    if missing:
        raise UserError(
            f"The config has no value for {', '.join(missing)}. Set it on the command line: {missing[0]}=..."
        )


def missing_keys(values: object, path: str = "") -> list[str]:
    """Dotted names of the keys that are still ???; OmegaConf's own search fails at references to them."""
    if isinstance(values, dict):
        return [name for key, value in values.items() for name in missing_keys(value, f"{path}.{key}".lstrip("."))]
    return [path] if values == "???" else []


def build_network(
    cfg: DictConfig, class_names: list[str], autoencoder: Autoencoder, objective: Objective
) -> tuple[DiT, Path | None, dict | None]:
    """The network of the config, from its pretrained file where one is named, else from seeded initial weights.

    With it, the file and the config of the network in it: new classes and another resolution change that.
    """
    channels, side, _ = autoencoder.latent_shape(cfg.data.resolution)
    shape = {"in_channels": channels, "input_size": side, "num_classes": len(class_names)}
    told = objective.process.network
    with seeded(cfg.seed):
        network = make(cfg.network, "network", **shape, **told)
    if cfg.pretrained is None:
        return network, None, None
    base = locate(cfg.pretrained, Path(cfg.paths.cache_dir) / "networks", download=not cfg.dry_run)
    process = given_process(cfg.get("pretrained_process"), "pretrained_process")
    with seeded(cfg.seed):
        read = read_network(base, process, network.config, "pretrained_process", **told)
    loaded, header = read.network, read.header
    base_config = loaded.config
    if cfg.new_resolution:
        loaded = at_resolution(loaded, network.config["input_size"], network.config["pos_embed_scale"])
    if cfg.classes is not None:
        names = header and header["provenance"]["class_names"]
        with seeded(cfg.seed):
            adapt_labels(loaded, cfg.classes, class_names, names)
    if loaded.num_classes != len(class_names):
        raise UserError(
            f"The base network {base.name} knows {loaded.num_classes} classes, the data has {len(class_names)}. "
            "Give data with the base's classes (data.classes), adapt its label table (classes=reinit, reuse, mean or "
            "map), or train without a base (pretrained=null peft=full)."
        )
    theirs = read.process if read.process.get("kind") == "flow" else GaussianProcess(**read.process).config
    _check_process(base, theirs, objective)
    if header is not None:
        _check_base(base, header, class_names if cfg.classes is None else None, autoencoder)
    different = _differences(loaded.config, network.config)
    if different:
        raise UserError(
            f"The base network {base.name} is another than network=: {different}. Choose its network=, "
            "or new_resolution=true where only input_size and pos_embed_scale differ."
        )
    return loaded, base, base_config


def at_resolution(network: DiT, input_size: int, pos_embed_scale: float) -> DiT:
    """The same weights for pictures of another size; the position table is computed anew."""
    other = type(network)(**(network.config | {"input_size": input_size, "pos_embed_scale": pos_embed_scale}))
    other.load_state_dict({key: value for key, value in network.state_dict().items() if key != "pos_embed"})
    other.fresh = network.fresh
    return other


def _check_process(base: Path, theirs: Mapping, objective: Objective) -> None:
    """Whether the objective can go on from what the base was trained on; a flow's takes a diffusion for one."""
    ours = objective.process.config
    if theirs.get("kind") == "flow" and ours.get("kind") != "flow":
        raise UserError(
            f"The base network {base.name} was trained on a flow, the objective is for a diffusion. "
            "Choose an objective= of flows."
        )
    if ours.get("kind") == "flow":
        diffusion = theirs.get("diffusion") if theirs.get("kind") == "flow" else dict(theirs)
        if diffusion:
            log.info("the base network %s was trained on a diffusion and is read as a flow", base.name)
            objective.process = objective.process.on_diffusion(diffusion)
        if theirs.get("kind") != "flow":
            return
    if theirs.get("step") == "none":  # it may learn to be told steps
        theirs = {key: value for key, value in theirs.items() if key not in ("step", "base_steps")}
    ours = objective.process.config
    different = _differences(theirs, ours)
    if different:
        values = " ".join(f"objective.process.{k}={v}" for k, v in theirs.items() if v != ours.get(k) and k != "kind")
        raise UserError(
            f"The base network {base.name} was trained on another process: {different}. "
            f"Set objective.* as there: {values}."
        )


def _check_base(base: Path, header: dict, class_names: list[str] | None, autoencoder: Autoencoder) -> None:
    provenance = header["provenance"]
    check_latents(f"base network {base.name}", provenance, autoencoder)
    if class_names not in (None, provenance["class_names"]):
        raise UserError(
            f"The classes of the data have other names than those of the base network {base.name}. "
            "Name the same classes in the same order (data.classes), or set classes=map."
        )


def check_latents(network: str, stored: Mapping, autoencoder: Autoencoder) -> None:
    """Whether a network, which says in `stored` what it was trained on, draws what this autoencoder decodes.

    Raises:
        UserError: it was trained on other latents.
    """
    if stored["autoencoder"] != autoencoder.latent_fingerprint:
        name = f", {stored['autoencoder_name']}" if "autoencoder_name" in stored else ""
        raise UserError(f"The {network} was trained on other latents{name}. Choose its autoencoder=.")


def _differences(theirs: Mapping, ours: Mapping) -> str:
    keys = [key for key in theirs if theirs[key] != ours.get(key)]
    return ", ".join(f"{key} {theirs[key]} there, {ours.get(key)} here" for key in keys)


def freeze_in_bf16(network: DiT) -> None:
    """Keep frozen weights in bf16, as autocast would round them in every step; what trains stays in fp32.

    Trainable parameters in bf16 would lose AdamW's small updates. Routers compute in fp32 under autocast too.
    """
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad and ".router." not in name:
            parameter.data = parameter.data.bfloat16()


def uses_bf16(cfg: DictConfig) -> bool:
    return str(cfg.trainer.precision).startswith("bf16")


def build_drawer(cfg: DictConfig, parts: Parts, sampler: DictConfig | None = None) -> Drawer:
    """How the run's pictures are drawn, by the config's sampler or another.

    Raises:
        UserError: the sampler or its steps do not suit the objective's process.
    """
    sampler = cfg.sampler if sampler is None else sampler
    drawer = Drawer(
        process=parts.objective.process,
        autoencoder=parts.autoencoder,
        resolution=cfg.data.resolution,
        bf16=uses_bf16(cfg),
        **make(sampler, "sampler"),
    )
    check(drawer.sampler, drawer.process, drawer.steps)
    if drawer.guidance != 1 and parts.network.config["class_dropout_prob"] <= 0:
        raise UserError("The network has no null class to be guided away from. Set sampler.guidance=1.")
    return drawer


def build_evaluation(
    cfg: DictConfig, drawer: Drawer, reference: Pictures, judge: object | None = None, store: Path | None = None
) -> Evaluation:
    """The fixed protocol of the config's metrics, against a reference; a `judge` may be shared."""
    judge = judge or make(cfg.metrics.judge, "metrics")
    return Evaluation(judge, reference, drawer, n=cfg.metrics.n, seed=cfg.metrics.seed, store=store)


def given_process(value: str | DictConfig | None, key: str) -> str | dict | None:
    """What `key` says that a file of others was trained on: a word for `read_network`, or a process's config.

    Raises:
        UserError: there is no such process.
    """
    if not isinstance(value, DictConfig):
        return value
    config = plain(value)
    try:
        return build_process(config).config
    except TypeError as error:
        raise UserError(
            f"{key} is no process ({error}). Give its keys as in configs/objective/, and kind: flow."
        ) from error


def plain(cfg: DictConfig) -> dict:
    """The config as plain values with everything resolved."""
    return OmegaConf.to_container(cfg, resolve=True)
