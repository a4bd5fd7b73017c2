"""The emoji's own AutoencoderKL: trained by a command, repeatable, loaded as the others."""

import json
from pathlib import Path

import hydra
import pytest
import torch
from helpers import ROOT, compose
from safetensors.torch import load_file

from ditune import cli
from ditune.autoencoders import KL
from ditune.build import make
from ditune.codec_study import psnr, reconstruct
from ditune.data import Pictures, from_uint8
from ditune.errors import UserError
from ditune.kl_training import fit


def small(out: Path, *overrides: str):
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        options = ["data.resolution=16", "+data.pictures.limit=8", "widths=[8,8,16]", "channels=4", "batch_size=4"]
        options += ["max_steps=30", "warmup_steps=2", "lr=5e-3", "bf16=false", "limit=3", f"out={out}"]
        return hydra.compose("fit_kl", [*options, *overrides])


def test_it_learns_and_is_loaded_with_its_own_scale(tmp_path):
    short, long = (fit(small(tmp_path / str(steps), f"max_steps={steps}")) for steps in (1, 30))
    before, after = (json.loads((folder / "result.json").read_text())["psnr_db"] for folder in (short, long))
    assert set(after) == {"noto", "twemoji", "fluent3d"}
    assert all(after[vendor] > before[vendor] + 1 for vendor in after)
    cfg = compose(tmp_path, "autoencoder=kl_emoji", f"autoencoder.folder={long}", "data=emoji_base").autoencoder
    codec = make(cfg, "autoencoder")
    assert codec.latent_shape(64) == (4, 16, 16)
    scale = json.loads((long / "config.json").read_text())["scaling_factor"]
    assert codec.scale.tolist() == pytest.approx([scale] * 4)
    assert torch.isfinite(codec.scale).all()


def test_the_same_seed_gives_the_same_weights(tmp_path):
    one, two = (fit(small(tmp_path / name, "max_steps=2")) for name in "ab")
    first, second = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (one, two))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_decoder_trained_further_forgives_noise_and_keeps_the_latents(tmp_path):
    first = fit(small(tmp_path / "first"))
    same = ["max_steps=60", "lr=2e-3", f"decoder_of={first}"]
    plain = fit(small(tmp_path / "plain", *same))
    robust = fit(small(tmp_path / "robust", *same, "latent_noise=1"))
    before, after = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (first, robust))
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"decoder", "post_quant_conv"}
    scales = {json.loads((folder / "config.json").read_text())["scaling_factor"] for folder in (first, robust)}
    assert len(scales) == 1
    x = from_uint8(Pictures(ROOT / "assets" / "emoji" / "noto.zip", 16, "train", limit=8).load())
    errors = []
    for folder in (plain, robust):
        codec = KL("kl", folder).eval()
        z = codec.encode(x)[0]
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)) / codec.scale[0]
        with torch.no_grad():
            errors.append((codec.decode(z + noise) - x).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


def test_noise_without_finished_latents_is_refused(tmp_path):
    with pytest.raises(UserError, match="Set decoder_of="):
        fit(small(tmp_path, "latent_noise=0.2"))


def test_without_it_the_error_names_the_command(tmp_path):
    cfg = compose(tmp_path, "autoencoder=kl_emoji", f"autoencoder.folder={tmp_path}/none").autoencoder
    with pytest.raises(UserError, match=r"python src/fit_kl\.py"):
        make(cfg, "autoencoder")


def test_the_shipped_one_on_an_unseen_vendor():
    codec = KL("kl_emoji", ROOT / "assets" / "autoencoders" / "kl_emoji").eval()
    unseen = Pictures(ROOT / "assets" / "emoji" / "fluent3d.zip", 64, "test", limit=50).load()
    assert codec.latent_shape(64) == (8, 16, 16)
    assert psnr(reconstruct(codec, unseen), unseen) > 29  # 30.9 on all 210, docs/autoencoders.md
