"""`python src/prepare.py`: which stages of `ditune.data.prepare` run, with the objects of a config."""

import logging
import os
from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from ditune.autoencoders import Autoencoder
from ditune.config.instantiate import instantiate, missing_keys, training_images
from ditune.config.needs import addresses_of, needs_of
from ditune.config.references import reference_images
from ditune.data import Benchmark, ImageDataset
from ditune.data import prepare as data
from ditune.data.latents import Latents
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.evaluation.held_out import CachedHeldOut, EncodedHeldOut, HeldOut
from ditune.files.locks import locked
from ditune.files.needs import fetch_all, refuse, with_reasons

log = logging.getLogger(__name__)

NOT_ALL = "Not everything can be had"
STAGES = ("fetch", "verify", "encode", "statistics")


def prepare(cfg: DictConfig) -> None:
    """Run the stages of a config of src/prepare.py.

    Raises:
        UserError: something is missing, broken or cannot be written; with the remedy.
    """
    missing = missing_keys(OmegaConf.to_container(cfg.data), "data")
    if missing:
        raise UserError(f"The config has no value for {missing[0]}. Set it on the command line: {missing[0]}=...")
    check_stages(cfg)
    if "fetch" in cfg.stages:
        bring_missing(cfg)
    if "verify" in cfg.stages:
        verify_pictures(cfg, cfg.policy, cfg.again)
    if "encode" in cfg.stages:
        autoencoder = instantiate(cfg.autoencoder, "autoencoder")
        dataset = training_images(cfg)
        encode(cfg, dataset, autoencoder, best_device(), cfg.again)
        encode_held_out(cfg, autoencoder, cfg.again)
    if "statistics" in cfg.stages:
        statistics(cfg)


def check_stages(cfg: DictConfig) -> None:
    """Raises UserError if `stages` names one that there is not."""
    unknown = [stage for stage in cfg.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"There is no stage '{unknown[0]}'. There are {', '.join(STAGES)}.")


def bring_missing(cfg: DictConfig) -> None:
    """Fetch the dataset, and of autoencoder and metrics what the stages ask for.

    Raises:
        UserError: something is missing and cannot be fetched; all of it is listed.
    """
    parts = ["data", *(["autoencoder"] * ("encode" in cfg.stages)), *(["metrics"] * ("statistics" in cfg.stages))]
    if cfg.download:
        needs = with_reasons(needs_of(cfg, parts))
        refuse([str(need) for need in needs if need.lost], NOT_ALL)
        fetch_all(needs)
    fetch(cfg, cfg.download)


def ensure(cfg: DictConfig) -> None:
    """For a training: bring the files of the dataset and write their manifest, if they are not there yet."""
    if missing_keys(OmegaConf.to_container(cfg.data), "data"):
        return  # said together with all other missing keys
    fetch(cfg, download=True)
    if cfg.data.latents and not manifest_path(cfg).is_file():
        verify_pictures(cfg, "raise")


def training_source(cfg: DictConfig, images: ImageDataset, autoencoder: Autoencoder) -> ImageDataset | Latents:
    """What a training reads: the images, or with data.latents the cache of their latents, made first if missing."""
    if not cfg.data.latents:
        return images
    return data.cached_latents(images, autoencoder, _prepared(cfg), best_device())


def held_out_images(cfg: DictConfig) -> ImageDataset | None:
    """Images that are not trained on, for the loss on them; None if it is not asked for, or there is no such split."""
    if cfg.metrics.loss_split is None:
        return None  # or all splits would be taken
    try:
        return instantiate(cfg.data.pictures, "data", split=cfg.metrics.loss_split)
    except UserError as error:
        log.info("no loss on held-out images: %s", error)
        return None


def held_out_source(cfg: DictConfig, images: ImageDataset, autoencoder: Autoencoder) -> HeldOut:
    """What the loss on held-out images reads; with data.latents their cache, made first if missing."""
    if not cfg.data.latents:
        return EncodedHeldOut(images, autoencoder)
    folder, _ = data.cache_of(images, autoencoder, _prepared(cfg), held_out=True)
    if not folder.is_dir() and not os.access(_prepared(cfg), os.W_OK):
        log.info("%s cannot be written; held-out images are encoded when their loss is measured", _prepared(cfg))
        return EncodedHeldOut(images, autoencoder)
    return CachedHeldOut(data.cached_means(images, autoencoder, _prepared(cfg), best_device()), autoencoder)


def encode_held_out(cfg: DictConfig, autoencoder: Autoencoder, again: bool = False) -> None:
    """The cache of the held-out images' latents, if the data has such a split."""
    images = held_out_images(cfg)
    if images is not None:
        data.encode(images, autoencoder, _prepared(cfg), best_device(), again, held_out=True)


def fetch(cfg: DictConfig, download: bool) -> None:
    """Bring the files of a public dataset; see `ditune.data.prepare.fetch`."""
    cls = get_class(cfg.data.pictures._target_)
    if issubclass(cls, Benchmark):  # other kinds of data are there or not
        data.fetch(cls, Path(cfg.data.root).expanduser(), download, addresses_of(cfg).get("archives") or ())


def verify_pictures(cfg: DictConfig, policy: str, again: bool = False) -> None:
    """The manifest of all splits; see `ditune.data.prepare.verify_images`."""
    dataset = instantiate(cfg.data.pictures, "data", split=None, manifest=None)
    data.verify_images(dataset, _prepared(cfg), policy, again)


def manifest_path(cfg: DictConfig) -> Path:
    """Where the manifest of the config's dataset lies."""
    return data.manifest_path(_prepared(cfg))


def cache_of(cfg: DictConfig, images: ImageDataset, autoencoder: Autoencoder) -> tuple[Path, dict]:
    """Folder and expected header of the latents; see `ditune.data.prepare.cache_of`."""
    return data.cache_of(images, autoencoder, _prepared(cfg))


def encode(
    cfg: DictConfig, images: ImageDataset, autoencoder: Autoencoder, device: torch.device, again: bool = False
) -> None:
    """The latent cache; see `ditune.data.prepare.encode`."""
    data.encode(images, autoencoder, _prepared(cfg), device, again)


def statistics(cfg: DictConfig) -> None:
    """Features of the reference dataset, kept in the folder where the metrics look for them."""
    suite, cache = instantiate(cfg.metrics.judge, "metrics"), Path(cfg.paths.cache_dir)
    suite.extractor.to(best_device())
    with data.writing(cache, "paths.cache_dir"), locked(cache / ".statistics.lock"):
        suite.reference(reference_images(cfg))


def _prepared(cfg: DictConfig) -> Path:
    return Path(cfg.data.prepared)
