"""The guide of a sampler's config, as an object: `sampler.guide` with its two keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ditune.config.finished import read_finished
from ditune.config.instantiate import instantiate
from ditune.errors import UserError
from ditune.samplers import BaseGuide, CheckpointGuide, Guide, InterpolatedGuide

KEYS = ("guide", "guide_checkpoint", "guide_strength")
OF_THE_BASE = ("base", "interpolated")  # guides that need the network from before it was adapted


def needs_base(sampler: Mapping[str, Any]) -> bool:
    """Whether a sampler's config asks for a guide that is or contains the base network."""
    return sampler.get("guide") in OF_THE_BASE


def build_sampling(sampler: DictConfig, cache_dir: str | Path) -> dict[str, Any]:
    """The arguments of an `ImageGenerator` that a sampler's config decides; keys that it leaves out are neutral.

    Args:
        sampler: of a training, a run or a command.
        cache_dir: where published networks lie.

    Raises:
        UserError: a key, or the guide's network, is wrong.
    """
    arguments = instantiate(sampler, "sampler")
    asked = {key: arguments.pop(key, None) for key in KEYS}
    return {**arguments, "guide": build_guide(asked, cache_dir)}


def build_guide(asked: Mapping[str, Any], cache_dir: str | Path) -> Guide | None:
    """The guide that the keys name; None = the network's own null class.

    Args:
        asked: `KEYS` of a sampler's config.
        cache_dir: where published networks lie.

    Raises:
        UserError: guide=checkpoint has no checkpoint, another guide has one, or it cannot be read.
    """
    guide, checkpoint = asked["guide"] or "null_class", asked["guide_checkpoint"]
    if (guide == "checkpoint") != (checkpoint is not None):
        raise UserError(
            f"sampler.guide is {guide} and sampler.guide_checkpoint is {checkpoint}. Set guide=checkpoint with "
            "guide_checkpoint=<run or file>, or another guide without it."
        )
    if guide == "checkpoint":
        return read_guide(checkpoint, cache_dir)
    if guide == "interpolated":
        return InterpolatedGuide(0.5 if asked["guide_strength"] is None else asked["guide_strength"])
    return BaseGuide() if guide == "base" else None


def read_guide(checkpoint: str, cache_dir: str | Path) -> CheckpointGuide:
    """The network of a run folder, with its adapter, or of a network file."""
    read = read_finished(checkpoint, cache_dir, "sampler.guide_checkpoint")
    return CheckpointGuide(read.network, read.sha256, read.process)
