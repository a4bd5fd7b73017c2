"""Linear autoencoders fitted on one domain, and their error on unseen images: `python studies/linear_codecs.py`.

Three numbers for each autoencoder and source of images ("vendor"):

- PSNR on the source's test split.
- The floor: KID of reconstructed images of one half of the train split against the real images of the other half. A
  perfect network reaches it in these latents. The column "real against real" is the same without an autoencoder.
- The floor with noise on the latents before they are decoded: a network with small errors everywhere.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ditune.autoencoders import Autoencoder, PatchPCA, Pixels
from ditune.autoencoders.quality import psnr, reconstruct
from ditune.cli import entry_point
from ditune.config.instantiate import instantiate
from ditune.config.keys import APART
from ditune.config.kinds import Key
from ditune.data import Pictures, from_uint8, to_uint8
from ditune.files.atomic import atomic, sha256, write_json
from ditune.generation.grids import before_after_sheet
from ditune.metrics import Judge, kid_with_deviation
from ditune.rng import generator

log = logging.getLogger(__name__)

CONFIGS = str(Path(__file__).resolve().parent / "configs")
APART["linear_codecs"] = (
    Key("channels", int, at_least=1, many=True),
    Key("patch", int, at_least=1),
    Key("pixels_resolution", int, at_least=1),
    Key("limit", int, at_least=1, null=True),
    Key("shown", int, at_least=1),
    Key("results", str),
    Key("vendors.*", str),
    Key("others.*.scale", float, above=0, null=True),
)


@dataclass(frozen=True)
class Candidate:
    """An autoencoder at the resolution at which it would be used."""

    name: str
    codec: Autoencoder
    resolution: int


@dataclass(frozen=True)
class Row:
    """Reconstruction error of an autoencoder on one source of images. A pair is (KID, its standard error)."""

    codec: str
    resolution: int
    numbers: int  # latent numbers of an image
    vendor: str
    psnr: float | None  # dB, on the test split; None = no loss
    floor: tuple[float, float]  # reconstructed against real images of the same resolution
    noised: tuple[float, float]  # the same with noise on the latents
    real: tuple[float, float]  # real against real images of the same resolution
    full: tuple[float, float]  # reconstructed against real images of data.resolution


def study(cfg: DictConfig) -> str:
    """Fit, save and measure; write the files that the config names, and return the table in Markdown.

    Raises:
        UserError: the settings or a file are wrong.
    """
    pictures = instantiate(cfg.data.pictures, "data")
    judge = instantiate(cfg.metrics.judge, "metrics")
    linear = fit(pictures, cfg.channels, cfg.patch, Path(cfg.out))
    candidates = [Candidate(f"none, {cfg.pixels_resolution} px", Pixels(), cfg.pixels_resolution), *linear]
    for name, other in cfg.others.items():
        codec = instantiate(other, "autoencoder").eval()
        candidates.append(Candidate(f"{name}, {codec.channels} channels", codec, cfg.data.resolution))
    rows, sheet = [], {}
    for vendor, source in cfg.vendors.items():
        log.info("measuring on %s", vendor)
        rows += measure(vendor, source, candidates, judge, cfg)
        sheet |= examples(vendor, source, candidates, cfg)
    folder, table = Path(cfg.results), markdown_table(rows, judge.extractor.name, cfg.data.resolution, cfg.noise)
    write_json(folder / "result.json", facts(cfg, pictures, linear, judge) | {"rows": [asdict(row) for row in rows]})
    with atomic(folder / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    before_after_sheet(sheet).save(folder / "codecs.png", optimize=True)
    return table


def fit(pictures: Pictures, channels: list[int], patch: int, out: Path) -> list[Candidate]:
    """A linear autoencoder for each number of channels, written to the folder `out`."""
    found = []
    provenance = {"data": pictures.fingerprint, "resolution": str(pictures.resolution)}
    for number in channels:
        PatchPCA(number, patch).latent_shape(pictures.resolution)  # refuses a wrong patch size before the fit
        codec = PatchPCA.fit(pictures.load(), number, patch, provenance=provenance)
        path = path_of(out, number)
        # safetensors orders metadata at random: the same weights written again would have another hash
        if not path.is_file() or PatchPCA.load(path).fingerprint != codec.fingerprint:
            codec.save(path)
        log.info("fitted %s", path)
        found.append(Candidate(f"patch_pca, {number} channels", codec, pictures.resolution))
    return found


def path_of(out: Path, channels: int) -> Path:
    return out / f"patch_pca_{channels}.safetensors"


def reconstructed(codec: Autoencoder, images: Tensor, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Encoded, decoded and rounded: uint8 (N, 3, R, R) -> the same; `noise` and `seed` as in `reconstruct`."""
    return to_uint8(reconstruct(codec, from_uint8(images), noise, seed))


def halves(rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two random halves of images (N, 3, R, R) or features (N, D); the same rows for the same N and seed."""
    order = torch.randperm(len(rows), generator=generator(seed))
    return rows[order[: len(order) // 2]], rows[order[len(order) // 2 :]]


def measure(vendor: str, source: str, candidates: list[Candidate], judge: Judge, cfg: DictConfig) -> list[Row]:
    """PSNR on the source's test split and the floor on its train split, for every candidate."""
    sides = {candidate.resolution for candidate in candidates} | {cfg.data.resolution}
    train = {side: Pictures(source, side, "train", limit=cfg.limit) for side in sides}
    features = {side: halves(judge.reference(pictures), cfg.seed) for side, pictures in train.items()}
    _, full = features[cfg.data.resolution]
    rows = []
    for candidate in candidates:
        codec, side = candidate.codec, candidate.resolution
        unseen = Pictures(source, side, "test", limit=cfg.limit).load()
        half, _ = halves(train[side].load(), cfg.seed)
        decoded = judge.features(reconstructed(codec, half))
        noised = judge.features(reconstructed(codec, half, cfg.noise, cfg.seed))
        real, other = features[side]
        rows.append(
            Row(
                codec=candidate.name,
                resolution=side,
                numbers=prod(codec.latent_shape(side)),
                vendor=vendor,
                psnr=psnr(reconstructed(codec, unseen), unseen),
                floor=kid_with_deviation(decoded, other),
                noised=kid_with_deviation(noised, other),
                real=kid_with_deviation(real, other),
                full=kid_with_deviation(decoded, full),
            )
        )
    return rows


def examples(vendor: str, source: str, candidates: list[Candidate], cfg: DictConfig) -> dict[str, Tensor]:
    """A row of originals of the test split, and below it one row for each candidate."""
    full = cfg.data.resolution
    rows = {f"{vendor}, {full} px": Pictures(source, full, "test", limit=cfg.shown).load()}
    for candidate in candidates:
        pictures = Pictures(source, candidate.resolution, "test", limit=cfg.shown).load()
        rows[f"{vendor}, {candidate.name}"] = reconstructed(candidate.codec, pictures)
    return rows


def facts(cfg: DictConfig, pictures: Pictures, linear: list[Candidate], judge: Judge) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    codecs = {}
    for candidate in linear:
        path = path_of(Path(cfg.out), candidate.codec.channels)
        identity = {"file": path.name, "sha256": sha256(path), "fingerprint": candidate.codec.fingerprint}
        codecs[candidate.name] = identity
    protocol = {"fitted_on": pictures.fingerprint, "noise": cfg.noise} | {k: cfg[k] for k in ("limit", "seed", "patch")}
    return {"protocol": protocol | {"features": judge.extractor.identity}, "codecs": codecs}


def markdown_table(rows: list[Row], extractor: str, full: int, noise: float) -> str:
    """One line for each autoencoder and source."""
    floor = f"floor (kid_{extractor})"
    distances = [floor, f"with noise of {noise:g}", "real against real", f"against real {full} px"]
    titles = ["codec", "vendor", "numbers", "PSNR, dB", *distances]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    for row in rows:
        quality = "nothing lost" if row.psnr is None else f"{row.psnr:.1f}"
        pairs = (row.floor, row.noised, row.real, row.full)
        distances = [f"{value:.4f} ± {deviation:.4f}" for value, deviation in pairs]
        lines.append("| " + " | ".join([row.codec, row.vendor, f"{row.numbers:,}", quality, *distances]) + " |")
    return "\n".join(lines) + "\n"


@entry_point("linear_codecs", CONFIGS)
def main(cfg: DictConfig) -> None:
    sys.stdout.write(study(cfg))


if __name__ == "__main__":
    main()
