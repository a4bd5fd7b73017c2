"""Getting a dataset ready, in stages that can be repeated, killed, and shared by any number of processes.

The stages are: fetch and unpack its files; verify every image and write the manifest; encode its latents. What they
make lies in one folder, `prepared`: manifest.csv, report.json and latents/. Commands and trainings call them.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditune.ahead import ahead
from ditune.data.benchmark import Benchmark
from ditune.data.images import ImageDataset
from ditune.data.latents import HEADER, TYPES, Latents, Means, Writer, check, expected_header, means_header
from ditune.data.transforms import from_uint8
from ditune.data.verify import is_valid, verify
from ditune.errors import UserError
from ditune.files.locks import locked, share
from ditune.memory import memory_for
from ditune.progress import meter

if TYPE_CHECKING:
    from ditune.autoencoders import Autoencoder  # at run time a caller brings it: reading images needs no network

log = logging.getLogger(__name__)

PIECE = 256  # images that one process encodes at a time
BATCH, HELD_OUT_BATCH = 32, 128  # images that the autoencoder is given at once; other sizes differ by rounding
ENCODING = "Free memory of the device, or set autoencoder.tiling=true."


def fetch(cls: type[Benchmark], root: Path, download: bool, mirrors: Sequence[str] = ()) -> None:
    """Bring the files of a public dataset to `root`, unless they are there.

    Args:
        cls: class of the dataset.
        root: folder for its files.
        download: whether archives that are missing may be downloaded.
        mirrors: addresses of folders that hold the archives, instead of the published ones.

    Raises:
        UserError: a file is missing (with what to put where), cannot be fetched, is damaged, or cannot be written.
    """
    if cls.is_complete(root):
        return
    with writing(root, "data.root"), locked(root / ".prepare.lock"):
        cls.fetch(root, download, mirrors)


def manifest_path(prepared: Path) -> Path:
    """Where the manifest of a dataset lies."""
    return prepared / "manifest.csv"


def verify_images(dataset: ImageDataset, prepared: Path, policy: str, again: bool = False) -> None:
    """Read every image and write the manifest of all splits, unless a valid one is there.

    Args:
        dataset: with all its splits, made without a manifest.
        prepared: folder for the manifest and the report.
        policy: "skip" = leave broken images out and report them; "raise" = stop at them.
        again: read everything again.

    Raises:
        UserError: images are broken and the policy is "raise"; or the folder cannot be written.
    """
    path = manifest_path(prepared)
    if not again and is_valid(dataset.everything, path):
        log.info("%s is valid", path)
    with writing(prepared, "data.prepared"):
        prepared.mkdir(parents=True, exist_ok=True)
        verify(dataset, path, policy, again)


def cache_of(
    dataset: ImageDataset, autoencoder: "Autoencoder", prepared: Path, held_out: bool = False
) -> tuple[Path, dict]:
    """Folder of the latents of one split, and the header that the cache in it must have.

    Args:
        dataset: one split at one resolution.
        autoencoder: that encodes it.
        prepared: folder with the manifest.
        held_out: only the means of the images as they are, in full precision, instead of what a training needs.

    Returns:
        (folder of the cache, expected header).

    Raises:
        UserError: there is no manifest yet.
    """
    manifest = manifest_path(prepared)
    if not manifest.is_file():
        raise UserError(
            f"There is no manifest {manifest}, and data.latents is set. Run `python src/prepare.py` with the "
            "same data= and autoencoder= first, or set data.latents=false to encode images in every step."
        )
    name = f"{dataset.split or 'all'}_{dataset.resolution}_{autoencoder.name}{dataset.suffix}"
    shape = autoencoder.latent_shape(dataset.resolution)
    header = expected_header(dataset, manifest, autoencoder.latent_fingerprint, shape, autoencoder.moments)
    if held_out:
        return prepared / "latents" / f"{name}_means", means_header(header)
    return prepared / "latents" / name, header


def cached_latents(dataset: ImageDataset, autoencoder: "Autoencoder", prepared: Path, device: torch.device) -> Latents:
    """The latents of one split, encoded first if they are not there.

    Args:
        dataset: one split at one resolution.
        autoencoder: that encodes it.
        prepared: folder with the manifest; gets the cache.
        device: where the autoencoder computes.

    Raises:
        UserError: there is no manifest, the cache cannot be written, or it is stale or damaged.
    """
    folder, header = cache_of(dataset, autoencoder, prepared)
    if not (folder / HEADER).is_file():
        encode(dataset, autoencoder, prepared, device)
    return Latents(folder, header, dataset.labels)


def cached_means(dataset: ImageDataset, autoencoder: "Autoencoder", prepared: Path, device: torch.device) -> Means:
    """The latents of a split that is not trained on, encoded first if they are not there; see `cached_latents`."""
    folder, header = cache_of(dataset, autoencoder, prepared, held_out=True)
    if not (folder / HEADER).is_file():
        encode(dataset, autoencoder, prepared, device, held_out=True)
    return Means(folder, header, dataset.labels)


def encode(
    dataset: ImageDataset,
    autoencoder: "Autoencoder",
    prepared: Path,
    device: torch.device,
    again: bool = False,
    held_out: bool = False,
) -> None:
    """Write the latent cache of one split; replace a stale one.

    Processes that start at once share the work. A cache gets its name when it is whole.

    Args:
        dataset: one split at one resolution.
        autoencoder: that encodes it; it is moved to `device`.
        prepared: folder with the manifest; gets the cache.
        device: where the autoencoder computes.
        again: encode even if a valid cache is there.
        held_out: see `cache_of`; else images and mirrored images.

    Raises:
        UserError: there is no manifest, no room or no permission, or the latents are not finite.
    """
    folder, header = cache_of(dataset, autoencoder, prepared, held_out)
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    if _is_cache(folder, header, dataset.labels):
        log.info("%s is valid", folder)
        return
    key = f"{header['manifest'][:8]}-{header['autoencoder'][:8]}"
    work_folder = folder.with_name(f".{folder.name}.{key}")
    autoencoder = autoencoder.to(device).eval()
    if dataset.in_memory:
        dataset.load()  # once, before threads ask for it
    with writing(folder.parent, "data.prepared"):
        _check_space(folder.parent, work_folder, header)
        writer = Writer(work_folder, header)

        def work(i: int) -> None:
            rows, encoded = range(i * PIECE, min((i + 1) * PIECE, len(dataset))), []
            for batch in _encoded(dataset, rows, autoencoder, device, held_out):
                encoded.append(batch)
                progress.advance(len(batch))
            writer.write(rows[0], torch.cat(encoded))

        pieces = -(-len(dataset) // PIECE)
        what = "encoding latents of held-out images" if held_out else "encoding latents"
        with meter(what, len(dataset)) as progress:
            share(work_folder / "pieces", pieces, work, lambda: _is_cache(folder, header, dataset.labels))
        writer.close()
        with locked(folder.with_name(".latents.lock")):
            if not _is_cache(folder, header, dataset.labels):
                writer.finish(dataset.labels, header)
                shutil.rmtree(work_folder / "pieces")
                shutil.rmtree(folder, ignore_errors=True)
                work_folder.rename(folder)
    log.info("latents of %d images are in %s", len(dataset), folder)


def _is_cache(folder: Path, header: dict, labels: Tensor) -> bool:
    try:
        check(folder, header, labels)
    except UserError:
        return False
    return True


def _check_space(folder: Path, work_folder: Path, header: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = TYPES[header["format"]].itemsize * int(torch.tensor(header["shape"]).prod())
    if (work_folder / "latents.npy").exists():
        needed -= (work_folder / "latents.npy").stat().st_blocks * 512
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The latents need {needed:,} bytes in {folder}, and {free:,} are free. "
            "Free some, or set data.prepared=<folder> on another disk."
        )


@torch.inference_mode()
def _encoded(
    dataset: ImageDataset, rows: range, autoencoder: "Autoencoder", device: torch.device, held_out: bool
) -> Iterator[Tensor]:
    """What the cache holds of the images, a batch at a time.

    Computed in fp32 at any precision of the training: the rounding would stay in every epoch.
    """
    size = HELD_OUT_BATCH if held_out else BATCH
    decoded = ahead(lambda i: dataset[i][0], rows, 2 * size)  # goes on while the autoencoder computes
    while batch := list(islice(decoded, size)):
        x = from_uint8(torch.stack(batch).to(device))  # (n, 3, R, R)
        with memory_for(f"encoding {len(x)} images at once", ENCODING):
            found = autoencoder.encode(x)[0] if held_out else _both_sides(autoencoder, x)
        if not torch.isfinite(found).all():
            raise UserError(
                f"The autoencoder gives numbers that are not finite for one of the images from "
                f"{dataset.names[rows[0]]} to {dataset.names[rows[-1]]}. Check its weights."
            )
        yield found.cpu()


def _both_sides(autoencoder: "Autoencoder", x: Tensor) -> Tensor:
    """Moments of images (n, 3, R, R) and their mirror images, float16 (n, 2, M, C, h, w)."""
    sides = []
    for side in (x, x.flip(-1)):
        found = [part for part in autoencoder.encode(side) if part is not None]
        sides.append(torch.stack(found, dim=1))  # (n, M, C, h, w)
    return torch.stack(sides, dim=1).half()


@contextmanager
def writing(folder: Path, key: str) -> Iterator[None]:
    """Make a sentence of a folder that cannot be written, or of a full disk.

    Args:
        folder: that the block writes to.
        key: of the config, which chooses another folder.

    Raises:
        UserError: the block has raised an OSError.
    """
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.is_dir())).free
        raise UserError(
            f"Cannot write to {folder} ({error}; {free:,} bytes are free there). What is whole stays; run this again "
            f"once there is room and permission, or set {key}=<another folder>."
        ) from error
