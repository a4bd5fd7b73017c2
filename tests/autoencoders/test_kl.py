"""Stable Diffusion's autoencoder, by one of the same architecture and small widths, saved as the hub lays it out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import DictConfig

from ditune.autoencoders import KL
from ditune.autoencoders.kl import DECODED, at_once
from ditune.commands.prepare import ensure, training_source
from ditune.config.base_network import check_latents
from ditune.config.components import build_components
from ditune.config.instantiate import instantiate
from ditune.config.training import build_module
from ditune.data.latents import Latents
from ditune.errors import UserError
from ditune.rng import StepRandom
from helpers import compose
from miniatures import cub
from small_vae import small_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_moments_scale_and_shapes_are_those_of_diffusers(folder, pictures):
    codec, vae = KL("small", folder).eval(), AutoencoderKL.from_pretrained(folder).eval()
    assert (codec.channels, codec.downsample, codec.moments, codec.name) == (4, 8, 2, "small")
    assert codec.latent_shape(64) == (4, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
        mean, logvar = codec.encode(pictures)
        assert torch.equal(mean, posterior.mean)
        assert torch.equal(logvar, posterior.logvar)
        noise = torch.randn(2, 4, 8, 8)
        latents = codec.to_latent(pictures, lambda shape: noise)
        torch.testing.assert_close(latents, 0.18215 * (posterior.mean + posterior.std * noise))
        decoded = codec.to_pixels(latents)
        torch.testing.assert_close(decoded, vae.decode(latents / 0.18215).sample)


def test_mirrored_pictures_have_latents_of_their_own(folder, pictures):
    """Which is why a cache holds both: the autoencoder pads on one side only."""
    codec = KL("small", folder).eval()
    with torch.no_grad():
        mirrored = codec.encode(pictures.flip(-1))[0]
        assert not torch.allclose(mirrored.flip(-1), codec.encode(pictures)[0], atol=1e-3)


def test_a_large_batch_is_computed_a_few_images_at_a_time(folder, monkeypatch):
    codec = KL("small", folder).eval()
    z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    x = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        one_by_one = torch.cat([codec.decode(part) for part in z.split(2)])
        means, logvars = (torch.cat(parts) for parts in zip(*(codec.encode(part) for part in x.split(2)), strict=True))
        seen: list[int] = []
        for part in (codec.vae.decoder, codec.vae.encoder):
            part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        monkeypatch.setattr("ditune.autoencoders.kl.DECODED", 2 * 64 * 64)
        monkeypatch.setattr("ditune.autoencoders.kl.ENCODED", 2 * 64 * 64)
        assert torch.equal(codec.decode(z), one_by_one)
        mean, logvar = codec.encode(x)
    assert seen == [2, 2, 1, 2, 2, 1]
    assert torch.equal(mean, means)
    assert torch.equal(logvar, logvars)


def test_channels_last_changes_rounding_alone(folder, pictures, monkeypatch):
    """It is used on GPUs; a CPU computes the same latents in that layout, and the fingerprint is the same."""
    plain, codec = KL("small", folder).eval(), KL("small", folder).eval()
    monkeypatch.setattr("ditune.autoencoders.kl.CHANNELS_LAST", ("cpu",))
    seen = []
    codec.vae.encoder.conv_in.register_forward_pre_hook(
        lambda layer, inputs: seen.extend(
            t.is_contiguous(memory_format=torch.channels_last) for t in (layer.weight, inputs[0])
        )
    )
    with torch.no_grad():
        found = codec.encode(pictures)
        monkeypatch.undo()
        for part, expected in zip(found, plain.encode(pictures), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(codec.encode(pictures)[0], plain.encode(pictures)[0])  # back in the layout of CPUs
    assert seen == [True, True, False, False]
    assert codec.latent_fingerprint == plain.latent_fingerprint


def test_chunks_keep_the_values_of_the_shipped_autoencoder():
    """Batches up to 256 images of 64 px are not split; 16 of 256 px fit, and one of 1024 px is still computed."""
    sides = {64: 256, 256: 16, 512: 4, 1024: 1, 4096: 1}
    assert {side: at_once(torch.empty(1, 4, side // 8, side // 8), 8, DECODED) for side in sides} == sides


def test_tiles_and_bf16(folder, pictures):
    with torch.no_grad():
        whole = (
            KL("small", folder).eval().to_pixels(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)))
        )
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
        tiled = KL("small", folder, tiling=True).eval().to_pixels(latents)
        half = KL("small", folder, bf16=True).eval()
        assert tiled.shape == whole.shape
        assert not torch.equal(tiled, whole)
        assert half.to_pixels(latents).dtype == torch.float32
        torch.testing.assert_close(half.to_pixels(latents), whole, atol=0.1, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):  # encoding is exact under autocast too
            assert torch.equal(half.encode(pictures)[0], KL("small", folder).eval().encode(pictures)[0])


def test_the_fingerprint_is_of_the_weights(folder, tmp_path):
    one, two = KL("small", folder), KL("other", small_vae(tmp_path / "again"))
    assert one.fingerprint == two.fingerprint
    two.vae.decoder.conv_out.bias.data += 1
    del two.fingerprint
    assert one.fingerprint != two.fingerprint


def test_another_decoder_has_the_same_latents(folder):
    one, two = KL("small", folder), KL("small", folder)
    two.vae.decoder.conv_out.bias.data += 1
    two.vae.post_quant_conv.bias.data += 1
    assert one.fingerprint != two.fingerprint
    assert one.latent_fingerprint == two.latent_fingerprint
    check_latents("network", {"autoencoder": one.latent_fingerprint}, two)
    for change in (lambda ae: ae.vae.encoder.conv_in.bias, lambda ae: ae.vae.quant_conv.bias, lambda ae: ae.scale):
        other = KL("small", folder)
        change(other).data += 1
        assert other.latent_fingerprint != one.latent_fingerprint
        with pytest.raises(UserError, match=r"other latents, vae\. Choose"):
            check_latents("network", {"autoencoder": one.latent_fingerprint, "autoencoder_name": "vae"}, other)


@pytest.mark.parametrize("name", ["sd_vae_ema", "sd_vae_mse"])
def test_the_configs_take_a_folder_or_say_what_to_put_there(tmp_path, folder, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    cfg = compose(tmp_path, f"autoencoder={name}", f"autoencoder.folder={folder}").autoencoder
    codec = instantiate(cfg, "autoencoder")
    assert codec.name == name
    assert codec.scale.tolist() == pytest.approx([0.18215] * 4)
    cfg.folder = str(tmp_path / "none")
    repository = f"stabilityai/sd-vae-ft-{name[-3:]}"
    with pytest.raises(UserError, match=f"(?s)config.json and .*huggingface.co/{repository}/tree/main into {tmp_path}"):
        instantiate(cfg, "autoencoder")


@pytest.mark.parametrize("damage", ["truncated", "not JSON", "other"])
def test_damaged_files_are_refused(folder, tmp_path, damage):
    copy = tmp_path / "vae"
    shutil.copytree(folder, copy)
    weights, config = copy / "diffusion_pytorch_model.safetensors", copy / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "not JSON":
        config.write_text("{")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 8}))
    with pytest.raises(UserError, match="cannot be read"):
        KL("small", copy)


def cached(root: Path, tmp_path: Path, folder: Path) -> tuple[DictConfig, Latents]:
    cub(root)
    overrides = ["data=cub", f"data.root={root}", "data.resolution=32", "autoencoder=sd_vae_ema"]
    cfg = compose(tmp_path, *overrides, f"autoencoder.folder={folder}")
    ensure(cfg)
    images, autoencoder = instantiate(cfg.data.pictures, "data"), instantiate(cfg.autoencoder, "autoencoder")
    return cfg, training_source(cfg, images, autoencoder)


def test_the_cache_holds_mean_and_log_variance_of_both_flips(tmp_path, folder):
    cfg, latents = cached(tmp_path / "cub", tmp_path, folder)
    pictures, codec = instantiate(cfg.data.pictures, "data"), KL("small", folder).eval()
    assert latents.shape == (12, 2, 2, 4, 4, 4)
    moments, _ = latents.take([5, 5], torch.tensor([False, True]))
    pixels = pictures.take([5, 5], torch.tensor([False, True]))[0].float() / 127.5 - 1
    with torch.no_grad():
        mean, logvar = codec.encode(pixels)
    torch.testing.assert_close(moments[:, 0].float(), mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(moments[:, 1].float(), logvar, atol=2e-3, rtol=2e-3)


def test_the_posterior_is_sampled_anew_in_every_step(tmp_path, folder):
    cfg, latents = cached(tmp_path / "cub", tmp_path, folder)
    overrides = ["~experiment", "network=tiny", "network.learn_sigma=true", "peft=full", "autoencoder=sd_vae_ema"]
    overrides += ["data=cub", f"data.root={tmp_path}/cub", "data.resolution=32", f"autoencoder.folder={folder}"]
    cfg = compose(tmp_path, *overrides)
    parts = build_components(cfg)
    module = build_module(cfg, parts, {})
    moments, _ = latents.take([0, 1])
    first, second = (module.latents(moments, StepRandom(0, step, [0, 1])) for step in (0, 1))
    mean, logvar = moments.float().unbind(1)
    assert not torch.equal(first, second)
    noise = StepRandom(0, 1, [0, 1]).normal("posterior", (4, 4, 4))
    torch.testing.assert_close(second, 0.18215 * (mean + torch.exp(logvar / 2) * noise))
