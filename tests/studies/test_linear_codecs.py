"""Fitting linear codecs: what is written, the quality of the shipped ones, a training that composes with them."""

import json
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig

from ditune import cli
from ditune.autoencoders import PatchPCA
from ditune.autoencoders.quality import psnr
from ditune.config.components import build_components
from ditune.data import Pictures
from ditune.errors import UserError
from ditune.files.atomic import sha256
from helpers import ROOT, compose
from studies.linear_codecs import CONFIGS, halves, reconstructed, study

SHIPPED = ROOT / "assets" / "autoencoders"
BASE = [ROOT / "assets" / "emoji" / f"{name}.zip" for name in ("noto", "twemoji")]
FLUENT3D = ROOT / "assets" / "emoji" / "fluent3d.zip"


def task(tmp_path: Path, *overrides: str) -> DictConfig:
    """The config of `linear_codecs.py <overrides>`, with its folders in `tmp_path`."""
    cli.prepare()
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        folders = [f"out={tmp_path}/codecs", f"results={tmp_path}/report", f"paths.cache_dir={tmp_path}/cache"]
        return hydra.compose("linear_codecs", [*folders, *overrides])


def test_a_small_study_writes_codecs_numbers_and_pictures(tmp_path: Path) -> None:
    small = ["channels=[4]", "+data.pictures.limit=32", "~vendors.twemoji", "~vendors.fluent3d"]
    table = study(task(tmp_path, *small, "limit=12", "shown=2", "+metrics.judge.batch_size=12"))
    codec = PatchPCA.load(tmp_path / "codecs" / "patch_pca_4.safetensors")
    fitted_on = Pictures(BASE, 64, "train", "subcategory", ROOT / "assets" / "emoji" / "classes.txt", limit=32)
    assert codec.provenance["data"] == fitted_on.fingerprint
    assert codec.provenance["pictures"] == "32"
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"result.json", "table.md", "codecs.png"}
    assert (tmp_path / "report" / "table.md").read_text() == table
    result = json.loads((tmp_path / "report" / "result.json").read_text())
    facts = result["codecs"]["patch_pca, 4 channels"]
    assert facts["fingerprint"] == codec.fingerprint
    assert facts["sha256"] == sha256(tmp_path / "codecs" / facts["file"])
    pixels, linear, small_vae = result["rows"]
    assert [row["numbers"] for row in (pixels, linear, small_vae)] == [3 * 32 * 32, 4 * 16 * 16, 8 * 16 * 16]
    assert small_vae["codec"] == "kl_emoji, 8 channels"
    assert pixels["psnr"] is None
    assert pixels["floor"] == pixels["real"] != pixels["full"]
    assert 15 < linear["psnr"] < 30
    assert pixels["noised"][0] > pixels["floor"][0]
    assert linear["floor"] == linear["full"] != linear["real"]
    assert len(table.splitlines()) == 5


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    grey = black.clone()
    grey[0] = 51  # a fifth of the range in half of the pictures
    assert psnr(grey, black) == pytest.approx(16.99, abs=0.01)  # -10 log10(0.04 / 2)
    assert psnr(black, black) is None


def test_halves_are_disjoint_and_complete() -> None:
    one, other = halves(torch.arange(11), seed=0)
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(11))
    assert torch.equal(one, halves(torch.arange(11), seed=0)[0])
    assert not torch.equal(one, halves(torch.arange(11), seed=1)[0])


def test_blocks_that_do_not_fill_the_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="64 pixels do not divide into blocks of 5"):
        study(task(tmp_path, "patch=5"))
    assert not (tmp_path / "codecs").exists()


# Measured on all 210 pictures: see docs/results/codecs.
@pytest.mark.parametrize(("channels", "least"), [(8, 25), (12, 27), (16, 29)])
def test_shipped_codecs_on_an_unseen_vendor(channels: int, least: float) -> None:
    codec = PatchPCA.load(SHIPPED / f"patch_pca_{channels}.safetensors")
    unseen = Pictures(FLUENT3D, 64, "test", limit=50).load()
    assert psnr(reconstructed(codec, unseen), unseen) > least


@pytest.mark.parametrize("channels", [8, 16])
def test_training_builds_with_a_shipped_codec(tmp_path: Path, channels: int) -> None:
    codec = ["autoencoder=patch_pca", f"autoencoder.channels={channels}", "data.resolution=64", "network=tiny"]
    parts = build_components(compose(tmp_path, "experiment=base_emoji", "pretrained=null", *codec))
    assert parts.autoencoder.fingerprint == PatchPCA.load(SHIPPED / f"patch_pca_{channels}.safetensors").fingerprint
    assert parts.autoencoder.provenance["data"] == parts.images.fingerprint
    assert parts.network.config["in_channels"] == channels
    assert parts.network.config["input_size"] == 16
