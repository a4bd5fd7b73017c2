"""Autoencoders: the interface, exactness of the linear codec, its measured quality, its file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ditune.autoencoders import Autoencoder, PatchPCA, Pixels
from ditune.autoencoders.patch_pca import fix_signs
from ditune.data import Pictures, from_uint8, to_uint8
from ditune.errors import UserError

EMOJI = Path(__file__).parents[2] / "assets" / "emoji"


class Noisy(Autoencoder):
    """A probabilistic codec whose mean and log-variance are known."""

    def __init__(self) -> None:
        super().__init__(channels=3, downsample=1)
        self.shift.copy_(torch.tensor([0.1, 0.2, 0.3]))
        self.scale.copy_(torch.tensor([1.0, 2.0, 4.0]))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(x, 2.0)

    def decode(self, z: Tensor) -> Tensor:
        return z


@pytest.fixture(scope="module")
def base() -> Tensor:
    return Pictures([EMOJI / "noto.zip", EMOJI / "twemoji.zip"], 64, split="train").load()


@pytest.fixture(scope="module")
def unseen() -> Tensor:
    return Pictures(EMOJI / "fluent3d.zip", 64, limit=600).load()


def pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shift_scale_and_noise() -> None:
    codec, x, noise = Noisy(), pixels(2, 3, 4, 4), lambda shape: torch.ones(2, *shape)
    assert torch.allclose(codec.to_latent(x)[:, 1], (x[:, 1] - 0.2) * 2)
    assert torch.allclose(codec.to_latent(x, noise)[:, 2], (x[:, 2] + torch.e - 0.3) * 4)
    assert torch.allclose(codec.to_pixels(codec.to_latent(x)), x, atol=1e-6)


def test_pixels_are_scaled_only() -> None:
    codec, x = Pixels(scale=2.0), pixels(2, 3, 8, 8)
    assert torch.equal(codec.to_latent(x, lambda shape: torch.ones(2, *shape)), 2 * x)
    assert torch.equal(codec.to_pixels(codec.to_latent(x)), x)
    assert codec.latent_shape(32) == (3, 32, 32)
    assert codec.fingerprint == Pixels(scale=2.0).fingerprint != Pixels().fingerprint


def test_all_components_lose_nothing(unseen: Tensor) -> None:
    codec = PatchPCA.fit(unseen[:64], channels=48, patch=4)
    x = from_uint8(unseen[64:96])
    assert torch.allclose(codec.to_pixels(codec.to_latent(x)), x, atol=1e-5)
    assert torch.equal(to_uint8(codec.to_pixels(codec.to_latent(x))), unseen[64:96])


@pytest.mark.parametrize("whiten", [False, True])
def test_components_are_orthonormal_and_latents_have_unit_variance(base: Tensor, whiten: bool) -> None:
    codec = PatchPCA.fit(base[:512], channels=8, patch=4, whiten=whiten)
    assert torch.allclose(codec.components @ codec.components.T, torch.eye(8), atol=1e-6)
    z = codec.to_latent(from_uint8(base[:512]))
    assert z.shape == (512, *codec.latent_shape(64)) == (512, 8, 16, 16)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    variance = z.double().var((0, 2, 3))
    assert torch.allclose(variance if whiten else variance.mean(), torch.ones((), dtype=torch.float64), atol=1e-3)
    assert whiten or torch.equal(variance.sort(descending=True).values, variance)


# Measured on all 1,852 pictures: 26.1, 28.7 and 30.9 dB of the mean squared error.
@pytest.mark.parametrize(("channels", "decibels"), [(8, 26.1), (12, 28.7), (16, 30.9)])
def test_quality_on_an_unseen_vendor(base: Tensor, unseen: Tensor, channels: int, decibels: float) -> None:
    codec = PatchPCA.fit(base, channels, patch=4)
    decoded = to_uint8(codec.to_pixels(codec.to_latent(from_uint8(unseen))))
    error = (decoded.double() - unseen.double()).square().mean() / 255**2
    assert -10 * error.log10() == pytest.approx(decibels, abs=0.4)


def test_fit_repeats_and_signs_are_fixed(unseen: Tensor) -> None:
    one, two = (PatchPCA.fit(unseen, channels=12) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    # The order of the pictures only changes rounding, which must not turn a component round.
    other = PatchPCA.fit(unseen.flip(0), channels=12)
    assert torch.allclose(one.components, other.components, atol=1e-5)
    assert torch.equal(fix_signs(-one.components), one.components)


def test_pictures_of_one_colour_stay_finite() -> None:
    codec = PatchPCA.fit(torch.full((4, 3, 8, 8), 255, dtype=torch.uint8), channels=4, whiten=True)
    assert torch.isfinite(codec.to_latent(pixels(1, 3, 8, 8))).all()


def test_file_keeps_everything(tmp_path: Path, unseen: Tensor) -> None:
    path = tmp_path / "codecs" / "pca.safetensors"
    codec = PatchPCA.fit(unseen[:64], channels=8, patch=4, whiten=True, provenance={"data": "abc"})
    codec.save(path)
    for again in (PatchPCA.load(path), PatchPCA(channels=8, patch=4, weights=path)):
        assert again.fingerprint == codec.fingerprint
        assert again.provenance == {"whiten": "true", "pictures": "64", "data": "abc"}
    assert [file.name for file in path.parent.iterdir()] == ["pca.safetensors"]
    fresh = PatchPCA(channels=8, patch=4)
    fresh.load_state_dict(codec.state_dict())
    assert fresh.fingerprint == codec.fingerprint


def test_files_that_do_not_fit_are_refused(tmp_path: Path, unseen: Tensor) -> None:
    path = tmp_path / "pca.safetensors"
    PatchPCA.fit(unseen[:8], channels=8).save(path)
    with pytest.raises(UserError, match="has 8 channels and blocks of 4 pixels, not 12 and 4"):
        PatchPCA(channels=12, weights=path)
    with pytest.raises(UserError, match="no linear autoencoder at"):
        PatchPCA.load(tmp_path / "missing.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        PatchPCA.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"not written by PatchPCA\.save"):
        PatchPCA.load(path)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="48 principal components, not 49"):
        PatchPCA(channels=49, patch=4)
    with pytest.raises(UserError, match="30 pixels do not divide into blocks of 4"):
        PatchPCA(channels=8, patch=4).latent_shape(30)
