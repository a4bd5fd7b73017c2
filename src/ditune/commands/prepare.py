"""Getting a data set ready, in stages that can be repeated, killed, and shared by any number of processes."""

import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ditune.autoencoders import Autoencoder
from ditune.config.instantiate import instantiate, missing_keys
from ditune.data import Benchmark, Pictures, from_uint8
from ditune.data.latents import HEADER, Latents, Writer, check, expected_header
from ditune.data.verify import is_valid, verify
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.files.locks import locked, share
from ditune.progress import meter

log = logging.getLogger(__name__)

STAGES = ("fetch", "verify", "encode", "statistics")
PIECE = 256  # pictures that one process encodes at a time
BATCH = 32  # pictures that the autoencoder sees at once


def prepare(cfg: DictConfig) -> None:
    """Run the stages of a config of src/prepare.py.

    Raises:
        UserError: something is missing, broken or cannot be written; with the remedy.
    """
    missing = missing_keys(OmegaConf.to_container(cfg.data), "data")
    if missing:
        raise UserError(f"The config has no value for {missing[0]}. Set it on the command line: {missing[0]}=...")
    unknown = [stage for stage in cfg.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"There is no stage '{unknown[0]}'. There are {', '.join(STAGES)}.")
    if "fetch" in cfg.stages:
        fetch(cfg, cfg.download)
    if "verify" in cfg.stages:
        verify_pictures(cfg, cfg.policy, cfg.again)
    if "encode" in cfg.stages:
        autoencoder = instantiate(cfg.autoencoder, "autoencoder")
        pictures = instantiate(cfg.data.pictures, "data")
        encode(cfg, pictures, autoencoder, best_device(), cfg.again)
    if "statistics" in cfg.stages:
        statistics(cfg)


def ensure(cfg: DictConfig) -> None:
    """For a training: bring the files of the data set, and their manifest, where they are not there yet."""
    if missing_keys(OmegaConf.to_container(cfg.data), "data"):
        return  # said together with all other missing keys
    fetch(cfg, download=True)
    if cfg.data.latents and not manifest_path(cfg).is_file():
        verify_pictures(cfg, "raise")


def training_source(cfg: DictConfig, pictures: Pictures, autoencoder: Autoencoder) -> Pictures | Latents:
    """What a training reads: the pictures, or (data.latents) the cache of their latents, made first where it lacks."""
    if not cfg.data.latents:
        return pictures
    folder, header = cache_of(cfg, pictures, autoencoder)
    if not (folder / HEADER).is_file():
        encode(cfg, pictures, autoencoder, best_device())
    return Latents(folder, header)


def fetch(cfg: DictConfig, download: bool) -> None:
    """The files of a public data set; other kinds of data are there or not."""
    cls = get_class(cfg.data.pictures._target_)
    if not issubclass(cls, Benchmark):
        return
    root = Path(cfg.data.root).expanduser()
    if _complete(cls, root):
        return
    with writing(root, "data.root"), locked(root / ".prepare.lock"):
        cls.fetch(root, download)


def _complete(cls: type[Benchmark], root: Path) -> bool:
    found = cls.find(root)
    return found is not None and (found != root / cls.tops[0] or all((root / a.makes).exists() for a in cls.archives))


def verify_pictures(cfg: DictConfig, policy: str, again: bool = False) -> None:
    """The manifest of all splits."""
    pictures = instantiate(cfg.data.pictures, "data", split=None, manifest=None)
    path = manifest_path(cfg)
    if not again and is_valid(pictures.everything, path):
        log.info("%s is valid", path)
    with writing(path.parent, "data.prepared"):
        path.parent.mkdir(parents=True, exist_ok=True)
        verify(pictures, path, policy, again)


def manifest_path(cfg: DictConfig) -> Path:
    return Path(cfg.data.prepared) / "manifest.csv"


def cache_of(cfg: DictConfig, pictures: Pictures, autoencoder: Autoencoder) -> tuple[Path, dict]:
    """Folder of the latents of `pictures`, and the header that the cache in it must have.

    Raises:
        UserError: there is no manifest yet.
    """
    if not manifest_path(cfg).is_file():
        raise UserError(
            f"There is no manifest {manifest_path(cfg)}, and data.latents is set. Run `python src/prepare.py` with the "
            "same data= and autoencoder= first, or set data.latents=false to encode pictures in every step."
        )
    name = f"{pictures.split or 'all'}_{pictures.resolution}_{autoencoder.name}"
    shape = autoencoder.latent_shape(pictures.resolution)
    header = expected_header(pictures, manifest_path(cfg), autoencoder.latent_fingerprint, shape, autoencoder.moments)
    return Path(cfg.data.prepared) / "latents" / name, header


def encode(
    cfg: DictConfig, pictures: Pictures, autoencoder: Autoencoder, device: torch.device, again: bool = False
) -> None:
    """The latent cache of `pictures`, plain and mirrored, unless it is there; a stale one is replaced."""
    folder, header = cache_of(cfg, pictures, autoencoder)
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    if _is_cache(folder, header):
        log.info("%s is valid", folder)
        return
    key = f"{header['manifest'][:8]}-{header['autoencoder'][:8]}"
    work_folder = folder.with_name(f".{folder.name}.{key}")
    autoencoder = autoencoder.to(device).eval()
    with writing(folder.parent, "data.prepared"):
        _check_space(folder.parent, work_folder, header)
        writer = Writer(work_folder, header)

        def work(i: int) -> None:
            rows, encoded = range(i * PIECE, min((i + 1) * PIECE, len(pictures))), []
            for batch in _encoded(pictures, rows, autoencoder, device):
                encoded.append(batch)
                progress.advance(len(batch))
            writer.write(rows[0], torch.cat(encoded))

        pieces = -(-len(pictures) // PIECE)
        with meter("encoding latents", len(pictures)) as progress:
            share(work_folder / "pieces", pieces, work, lambda: _is_cache(folder, header))
        writer.close()
        with locked(folder.with_name(".latents.lock")):
            if not _is_cache(folder, header):
                writer.finish(pictures.labels, header)
                shutil.rmtree(work_folder / "pieces")
                shutil.rmtree(folder, ignore_errors=True)
                work_folder.rename(folder)
    log.info("latents of %d pictures are in %s", len(pictures), folder)


def _is_cache(folder: Path, header: dict) -> bool:
    try:
        check(folder, header)
    except UserError:
        return False
    return True


def _check_space(folder: Path, work_folder: Path, header: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = 2 * int(torch.tensor(header["shape"]).prod())
    if (work_folder / "latents.npy").exists():
        needed -= (work_folder / "latents.npy").stat().st_blocks * 512
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The latents need {needed:,} bytes in {folder}, and {free:,} are free. "
            "Free some, or set data.prepared=<folder> on another disk."
        )


@torch.inference_mode()
def _encoded(pictures: Pictures, rows: range, autoencoder: Autoencoder, device: torch.device) -> Iterator[Tensor]:
    """Moments of pictures and their mirror images, float16 (n, 2, M, C, h, w), a batch at a time.

    In fp32 whatever the training's precision is: the rounding would stay in every epoch.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda i: pictures[i][0], rows)  # goes on while the autoencoder computes
        while batch := list(islice(decoded, BATCH)):
            x = from_uint8(torch.stack(batch).to(device))  # (n, 3, R, R)
            sides = []
            for side in (x, x.flip(-1)):
                found = [part for part in autoencoder.encode(side) if part is not None]
                sides.append(torch.stack(found, dim=1))  # (n, M, C, h, w)
            moments = torch.stack(sides, dim=1).half()
            if not torch.isfinite(moments).all():
                raise UserError(
                    f"The autoencoder gives numbers that are not finite for one of the pictures from "
                    f"{pictures.names[rows[0]]} to {pictures.names[rows[-1]]}. Check its weights."
                )
            yield moments.cpu()


def statistics(cfg: DictConfig) -> None:
    """Features of the reference that the metrics compare with, kept where the metrics look for them."""
    judge = instantiate(cfg.metrics.judge, "metrics")
    judge.extractor.to(best_device())
    with writing(Path(cfg.paths.cache_dir), "paths.cache_dir"), locked(Path(cfg.paths.cache_dir) / ".statistics.lock"):
        judge.reference(instantiate(cfg.metrics.reference, "metrics"))


@contextmanager
def writing(folder: Path, key: str) -> Iterator[None]:
    """A folder that cannot be written, or a full disk, becomes a sentence."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.is_dir())).free
        raise UserError(
            f"Cannot write to {folder} ({error}; {free:,} bytes are free there). What is whole stays; run this again "
            f"once there is room and permission, or set {key}=<another folder>."
        ) from error
