"""Pairs of noise and latent for the objectives that distil a flow: `python src/sample.py ... pairs=<folder>`."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from ditune.errors import UserError
from ditune.evaluation.image_shards import weights_hash
from ditune.files.atomic import atomic, read_json, write_json
from ditune.objectives.pairs import FORMAT, HEADER, LABELS, shard_file
from ditune.progress import meter
from ditune.run import Trained

log = logging.getLogger(__name__)


def make_pairs(cfg: DictConfig, trained: Trained, labels: Tensor, settings: dict[str, Any]) -> Path:
    """Write `cfg.n` latents into the folder `cfg.pairs`, file by file; an earlier start's files are kept.

    Args:
        cfg: of src/sample.py.
        trained: the network, on its device, and how it generates.
        labels: (n,) classes of the pairs.
        settings: what decides the latents, besides the network.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds other pairs, or the sampler is no function of the noise.
    """
    folder, generator, size = Path(cfg.pairs).expanduser(), trained.generator, trained.generator.batch_size
    if cfg.first:
        raise UserError(f"first is {cfg.first}, and pairs= are made from the first one on. Leave first= out.")
    header = {
        "format": FORMAT,
        "n": cfg.n,
        "shard": size,
        "seed": cfg.seed,
        "shape": list(generator.autoencoder.latent_shape(generator.resolution)),
        "class_names": trained.class_names,
        "classes": None if cfg.classes is None and cfg.class_name is None else sorted(set(labels.tolist())),
        "autoencoder": generator.autoencoder.latent_fingerprint,
        "autoencoder_name": generator.autoencoder.name,
        "process": generator.process.config,
        "weights": weights_hash(trained.network),
        **settings,
    }
    written = json.loads(json.dumps(header))
    if (folder / HEADER).is_file() and read_json(folder / HEADER) != written:
        raise UserError(f"{folder} holds pairs that were made with other settings. Delete it, or set another pairs=.")
    shards = {i: range(i * size, min((i + 1) * size, cfg.n)) for i in range(-(-cfg.n // size))}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / HEADER, header)
    write_array(folder / LABELS, labels)
    missing = {i: rows for i, rows in shards.items() if not shard_file(folder, i).is_file()}
    with meter(f"making pairs in {generator.steps} steps", sum(map(len, missing.values()))) as progress:
        for i, rows in missing.items():
            latents = generator.pairs(trained.network, labels[rows.start : rows.stop], cfg.seed, rows)
            write_array(shard_file(folder, i), latents)
            progress.advance(len(rows))
    log.info("%d pairs are in %s; train on them with objective=reflow objective.pairs=%s", cfg.n, folder, folder)
    return folder


def write_array(path: Path, values: Tensor) -> None:
    """Write a .npy file, completely or not at all."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, values.numpy())
