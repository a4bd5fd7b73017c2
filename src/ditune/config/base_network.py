"""The pretrained network of a config: read, given a new label table or resolution, and its process matched."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ditune.autoencoders import Autoencoder
from ditune.checkpoints import locate, read_network
from ditune.checkpoints.source import Source
from ditune.config.instantiate import instantiate, plain
from ditune.config.sharded import is_sharded
from ditune.errors import UserError
from ditune.files.atomic import sha256
from ditune.networks import DiT
from ditune.networks.unfilled import Uninitialised, unfilled
from ditune.peft import adapt_labels
from ditune.processes import GaussianProcess, Process, build_process, is_flow
from ditune.rng import seeded
from ditune.training.components import Base

log = logging.getLogger(__name__)


def build_network(
    cfg: DictConfig, class_names: list[str], autoencoder: Autoencoder, inputs: Mapping[str, Any]
) -> tuple[DiT, Base | None]:
    """The network of the config: read from its pretrained file, or with seeded initial weights.

    With trainer=fsdp the weights are read when the network is cut, and a plan of a new network needs none.

    Args:
        cfg: of a training.
        class_names: of the data.
        autoencoder: decides the shape of the latents.
        inputs: arguments for the network's further inputs, see `Objective.inputs`.

    Raises:
        UserError: the file is missing, damaged or of an unknown kind.
    """
    channels, side, _ = autoencoder.latent_shape(cfg.data.resolution)
    shape = {"in_channels": channels, "input_size": side, "num_classes": len(class_names)}
    later = is_sharded(cfg)
    if cfg.pretrained is None:
        with seeded(cfg.seed):
            if not later and cfg.dry_run is not True:
                return instantiate(cfg.network, "network", **shape, **inputs), None
            with unfilled() as initialisation:
                network = instantiate(cfg.network, "network", **shape, **inputs)
            Uninitialised(network, initialisation)
            return network, None
    path = locate(cfg.pretrained, Path(cfg.paths.cache_dir) / "networks", download=not cfg.dry_run)
    source = Source(path)
    opened = {"source": source} if "checkpoint" in cfg.network else {}  # network=as_pretrained takes its sizes from it
    with unfilled():
        ours = instantiate(cfg.network, "network", **shape, **inputs, **opened).config
    given = given_process(cfg.get("pretrained_process"), "pretrained_process")
    with seeded(cfg.seed):
        read = read_network(source, given, ours, "pretrained_process", later, **inputs)
    loaded, config = read.network, read.network.config
    if cfg.new_resolution:
        loaded = at_resolution(loaded, ours["input_size"], ours["pos_embed_scale"])
    if cfg.classes is not None:
        names = read.header and read.header["provenance"]["class_names"]
        with seeded(cfg.seed):
            adapt_labels(loaded, cfg.classes, class_names, names)
    theirs = read.process if is_flow(read.process) else GaussianProcess(**read.process).config
    return loaded, Base(
        path=path,
        sha256=sha256(path),
        config=config,
        process=theirs,
        header=read.header,
        reshaped=cfg.classes is not None or config != loaded.config,
        differences=differences(loaded.config, ours),
    )


def at_resolution(network: DiT, input_size: int, pos_embed_scale: float) -> DiT:
    """The same weights, not copied, for images of another size; the position table is computed anew."""
    with unfilled():
        other = type(network)(**(network.config | {"input_size": input_size, "pos_embed_scale": pos_embed_scale}))
    weights = {key: value for key, value in network.state_dict().items() if key != "pos_embed"}
    other.load_state_dict(weights, assign=True)
    other.new_parameter_prefixes, other.unread = network.new_parameter_prefixes, network.unread
    return other


def match_process(ours: Process, theirs: Mapping[str, Any]) -> Process:
    """The objective's process as it goes on from the base's: a flow reads a diffusion as a flow.

    Args:
        ours: of the objective.
        theirs: config of the base's process.
    """
    if not is_flow(ours.config):
        return ours
    diffusion = theirs.get("diffusion") if is_flow(theirs) else dict(theirs)
    if not diffusion:
        return ours
    if is_flow(theirs):  # as it was read before
        ours = ours.changed(bridge="path" if theirs["kind"] == "diffusion_path" else "aligned")
    log.info("the base network was trained on a diffusion and is read as a flow")
    return ours.on_diffusion(diffusion)


def given_process(value: str | DictConfig | None, key: str) -> str | dict[str, Any] | None:
    """What `key` says that a file of others was trained on.

    Args:
        value: a word that `read_network` knows, or the config of a process.
        key: for the message.

    Raises:
        UserError: there is no such process.
    """
    if not isinstance(value, DictConfig):
        return value
    try:
        return build_process(plain(value)).config
    except UserError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        raise UserError(
            f"{key} is no process ({error.__cause__}). Give its keys as in configs/objective/, and kind: flow."
        ) from error


def check_latents(network: str, stored: Mapping[str, Any], autoencoder: Autoencoder) -> None:
    """Refuse a network whose latents the autoencoder does not decode.

    Args:
        network: its name in the message.
        stored: what its file says about its autoencoder.
        autoencoder: that of the config.

    Raises:
        UserError: the network was trained on other latents.
    """
    text = other_latents(network, stored, autoencoder)
    if text is not None:
        raise UserError(text)


def other_latents(network: str, stored: Mapping[str, Any], autoencoder: Autoencoder) -> str | None:
    """The sentence of `check_latents`, or None."""
    if stored["autoencoder"] == autoencoder.latent_fingerprint:
        return None
    name = f", {stored['autoencoder_name']}" if "autoencoder_name" in stored else ""
    return f"The {network} was trained on other latents{name}. Choose its autoencoder=."


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Keys of `theirs` whose values differ, with both values, as text; "" = none."""
    keys = [key for key in theirs if theirs[key] != ours.get(key)]
    return ", ".join(f"{key} {theirs[key]} there, {ours.get(key)} here" for key in keys)
