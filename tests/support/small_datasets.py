"""Small datasets as files, and the config of `prepare.py` for them."""

import csv
import io
import tarfile
import zipfile
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from PIL import Image

from ditune import cli

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "eel": (30, 30, 200)}


def png(colour: tuple[int, ...] = (10, 20, 30), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    """Content of a png file of one colour."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "png")
    return buffer.getvalue()


def make(path: Path, files: dict[str, bytes]) -> Path:
    """A zip file when the path says so, else a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def table(rows: list[dict[str, str]]) -> bytes:
    """Content of a CSV file."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def tree(prefix: str = "", count: int = 3) -> dict[str, bytes]:
    """Files of three classes of one colour each, by name."""
    return {f"{prefix}{name}/{i}.png": png(colour) for name, colour in COLOURS.items() for i in range(count)}


def identity(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """For loaders over datasets, whose `__getitems__` returns a batch."""
    return batch


def prepare_config(root: Path, *overrides: str) -> DictConfig:
    """Config of `prepare.py` with latents of 4 x 4, without statistics."""
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        return hydra.compose(
            "prepare",
            [
                *(f"data.root={root}", f"paths.cache_dir={root}/cache", "data.resolution=16", "autoencoder=patch_pca"),
                *("stages=[fetch,verify,encode]", "download=false", *overrides),
            ],
        )


def stamp(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def pack(folder: Path, path: Path) -> Path:
    """A tar or zip file of what is in `folder`."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for entry in sorted(folder.iterdir()):
                archive.add(entry, entry.name)
    return path
