"""Disk space that a training takes, estimated before it begins, against what is free where it goes."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.utils import get_class
from omegaconf import DictConfig

from ditune.data.latents import HEADER
from ditune.files.needs import Need, written
from ditune.training.components import Components
from ditune.training.plan import counts

CHECKPOINT = 16  # bytes of a trained parameter: weight, EMA and two moments of the optimizer, in fp32
WEIGHT = 4  # bytes of a parameter in fp32


@dataclass(frozen=True)
class Space:
    """Room that something takes.

    Args:
        what: it is.
        path: where it goes.
        size: in bytes.
    """

    what: str
    path: Path
    size: int


def spaces(cfg: DictConfig, c: Components, folder: Path, needs: Sequence[Need]) -> list[Space]:
    """What a training writes, besides its log; things that are there already are left out.

    Args:
        cfg: of the training.
        c: what it is made of.
        folder: of the run.
        needs: files that it needs.
    """
    trainable, total = counts(c.network)
    size, kept = checkpoint_size(trainable), kept_checkpoints(cfg)
    sheets = 2 + (cfg.max_steps // every if (every := cfg.callbacks.samples.every_n_steps) else 0)
    side = cfg.data.resolution
    found = [Space(need.what, need.path, (need.size or 0) + (need.unpacked or 0)) for need in needs if need.fetchable]
    if cfg.data.latents:
        found.append(_latents(cfg, c))
    if cfg.metrics.n:
        width = getattr(get_class(cfg.metrics.judge.extractor._target_), "width", None) or 0
        found.append(Space("reference features", Path(cfg.paths.cache_dir), len(c.images) * width * 4))
    label = f"{kept} checkpoints of {written(size)} and one while it is written"
    found.append(Space(label, folder, size * (kept + 1) if kept else 0))
    found.append(
        Space("network", folder, WEIGHT * total) if c.base is None else Space("adapter", folder, WEIGHT * trainable)
    )
    images = Space("sample grids", folder, sheets * cfg.callbacks.samples.n * side * side * 3)
    return [space for space in (*found, images) if space.size]


def checkpoint_size(trainable: int) -> int:
    """Bytes of one checkpoint; what it holds besides the trained parameters is small."""
    return CHECKPOINT * trainable


def kept_checkpoints(cfg: DictConfig) -> int:
    """How many checkpoints lie in the run folder at most, without the one that is being written."""
    every, keep = cfg.callbacks.checkpoint.every_n_steps, cfg.callbacks.checkpoint.keep
    if not every:
        return 0
    made = -(-cfg.max_steps // every)
    return made if keep < 0 else min(keep, made)


def _latents(cfg: DictConfig, c: Components) -> Space:
    shape = c.autoencoder.latent_shape(cfg.data.resolution)
    prepared = Path(cfg.data.prepared).expanduser()
    part = getattr(c.images, "suffix", "")  # images that are not there yet have none
    split = cfg.data.pictures.split or "all"
    cache = prepared / "latents" / f"{split}_{cfg.data.resolution}_{c.autoencoder.name}{part}"
    numbers = shape[0] * shape[1] * shape[2] * c.autoencoder.moments * 2  # of an image and its mirror image
    return Space("latents", prepared, 0 if (cache / HEADER).is_file() else len(c.images) * numbers * 2)


def line(found: Sequence[Space]) -> str:
    """All spaces, the sum, and what is free, as one line of a plan."""
    parts = ", ".join(f"{space.what} {written(space.size)}" for space in found)
    free = {written(_free(space.path)) for space in found}
    return f"{parts}; in all {written(sum(space.size for space in found))} (expected), free: {', '.join(sorted(free))}"


def shortage(found: Sequence[Space]) -> list[str]:
    """A sentence for each file system that has less room than is expected to be written to it."""
    sums: dict[int, list[Space]] = {}
    for space in found:
        sums.setdefault(_existing(space.path).stat().st_dev, []).append(space)
    return [
        f"About {written(size)} will be written to the file system of {there[0].path}, and {written(free)} are free "
        f"there ({', '.join(f'{space.what} {written(space.size)}' for space in there)}). Free some, keep fewer "
        "checkpoints (callbacks.checkpoint.keep), or choose another place by run_dir=, data.root= or paths.*=."
        for there in sums.values()
        if (size := sum(space.size for space in there)) > (free := _free(there[0].path))
    ]


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free
