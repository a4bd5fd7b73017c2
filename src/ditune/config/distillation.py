"""The frozen teacher and the pairs of an objective that distils, read and checked against the student."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from ditune.autoencoders import Autoencoder
from ditune.config.base_network import other_latents
from ditune.config.finished import read_finished
from ditune.errors import UserError
from ditune.objectives import Objective
from ditune.objectives.pairs import Pairs
from ditune.objectives.teacher import Teacher
from ditune.processes import FlowProcess, build_process, is_flow


def read_sources(cfg: DictConfig, objective: Objective, class_names: Sequence[str], autoencoder: Autoencoder) -> None:
    """Give an objective the teacher and the pairs that its config names.

    Args:
        cfg: of a training.
        objective: of the config.
        class_names: of the data.
        autoencoder: of the config.

    Raises:
        UserError: one is missing or damaged, or of other classes, latents or a path that is not straight.
    """
    side = cfg.data.resolution
    if cfg.objective.get("teacher") is not None:
        objective.teacher = read_teacher(cfg, class_names, autoencoder, side)
    if cfg.objective.get("pairs") is not None:
        pairs = Pairs(cfg.objective.pairs)
        what = f"pairs in {cfg.objective.pairs}"
        refuse_others(what, "objective.pairs", pairs.header, class_names, autoencoder)
        refuse_shape(what, "objective.pairs", tuple(pairs.header["shape"]), autoencoder, side)
        objective.pairs = pairs


def read_teacher(cfg: DictConfig, class_names: Sequence[str], autoencoder: Autoencoder, side: int) -> Teacher:
    """The teacher, a network of any depth and width with the classes and latents of the data.

    Args:
        cfg, class_names, autoencoder: as of `read_sources`.
        side: of the images, in pixels.
    """
    name = cfg.objective.teacher
    read = read_finished(name, cfg.paths.cache_dir, "objective.teacher", download=not cfg.dry_run)
    network, what = read.network, f"teacher {name}"
    refuse_others(what, "objective.teacher", read.facts or {}, class_names, autoencoder)
    if network.num_classes != len(class_names):
        raise UserError(
            f"The {what} knows {network.num_classes} classes, the data has {len(class_names)}. "
            "Set data= to the teacher's, or objective.teacher to a network of these classes."
        )
    size = network.config["input_size"]
    refuse_shape(what, "objective.teacher", (network.in_channels, size, size), autoencoder, side)
    if objective_guides(cfg) and network.config["class_dropout_prob"] <= 0:
        raise UserError(f"The {what} has no null class to be guided away from. Set objective.guidance=1.")
    process = build_process(read.process) if is_flow(read.process) else FlowProcess().on_diffusion(read.process)
    if process.config["kind"] != "flow":
        raise UserError(
            f"The {what} is a flow on a diffusion's own path, and targets are made on the straight one. Set "
            "objective.teacher to a network that was trained with objective.process.bridge=aligned."
        )
    return Teacher(network, process, read.sha256)


def objective_guides(cfg: DictConfig) -> bool:
    """Whether the objective's teacher is called with classifier-free guidance."""
    return cfg.objective.get("guidance", 1.0) != 1


def refuse_others(
    what: str, key: str, facts: Mapping[str, Any], class_names: Sequence[str], autoencoder: Autoencoder
) -> None:
    """Refuse what says that it is of other latents or classes than the data.

    Args:
        what: name in the message.
        key: that names it.
        facts: `autoencoder` and `class_names`, where they are known.
        class_names, autoencoder: of the training.

    Raises:
        UserError: it is.
    """
    if facts.get("autoencoder") is not None:
        text = other_latents(what, facts, autoencoder)
        if text is not None:
            raise UserError(text)
    theirs = facts.get("class_names")
    if theirs is not None and list(theirs) != list(class_names):
        raise UserError(
            f"The {what} has {len(theirs)} classes, and the data has {len(class_names)} or others. "
            f"Name the same classes in the same order (data.classes), or set another {key}."
        )


def refuse_shape(what: str, key: str, theirs: tuple[int, ...], autoencoder: Autoencoder, side: int) -> None:
    """Refuse latents of another shape.

    Args:
        what, key: see `refuse_others`.
        theirs: (C, h, w).
        autoencoder: of the training.
        side: of the training's images, in pixels.

    Raises:
        UserError: the training's latents have another shape.
    """
    ours = tuple(autoencoder.latent_shape(side))
    if theirs != ours:
        shapes = [" x ".join(map(str, shape)) for shape in (theirs, ours)]
        raise UserError(
            f"The {what} has latents of {shapes[0]}, the training of {shapes[1]}. Set data.resolution and "
            f"autoencoder= as there, or another {key}."
        )
