"""What stored files, caches and records are known by, as literals: renaming a class or attribute moves none of them."""

import json

import pytest
from safetensors import safe_open

from ditune import samplers
from ditune.autoencoders import KL, PatchPCA, Pixels
from ditune.networks import CLASSES
from helpers import ROOT

ASSETS = ROOT / "assets"


def patch_pca(channels: int) -> PatchPCA:
    return PatchPCA(channels, 4, ASSETS / "autoencoders" / f"patch_pca_{channels}.safetensors")


@pytest.mark.parametrize(
    ("autoencoder", "name", "fingerprint"),
    [
        (
            lambda: KL("kl_emoji", ASSETS / "autoencoders" / "kl_emoji"),
            "kl_emoji",
            "7a30c2eda1b219c0853de374f96494d6c48a376abdc7a73b913509927c83572b",
        ),
        (lambda: patch_pca(8), "patchpca_8", "b72f9de8ac314936f6b0e11ad7d6c69b7394ee52f7ab90b486273219c8c4b289"),
        (lambda: patch_pca(12), "patchpca_12", "0673c46c174fbc9c63089efdee9d40692606e0cc2c2e0a764a62c74941e429fb"),
        (lambda: patch_pca(16), "patchpca_16", "3fb038c93163ec11f38a30f5a5bb68313c218e5189842e3118f286e7b11965f1"),
        (Pixels, "pixels_3", "e6a42371b2400380241ad590085fa0f70e5e2834278b88c6635d72b0b5012ab3"),
        (lambda: Pixels(scale=2.0), "pixels_3", "a842b52a31069ef7b22677ddcd9b19fdf65ff26e89c9f3cd909e2e8f64fe7ad5"),
    ],
)
def test_autoencoders(autoencoder, name, fingerprint):
    built = autoencoder()
    assert (built.name, built.fingerprint) == (name, fingerprint)


def test_latents_of_the_shipped_autoencoder():
    """By this the shipped base network and every cache of its latents know it."""
    built = KL("kl_emoji", ASSETS / "autoencoders" / "kl_emoji")
    assert built.latent_fingerprint == "837bf7b109a395d9a263bb0f0b01db642ee1e5386db21017cc59a67b142c5d3f"


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (samplers.DDIM(eta=1.0), "DDIM {'eta': 1.0, 'clip': 0.0}"),
        (samplers.DDPM(), "DDPM {'clip': 0.0}"),
        (samplers.Euler(told=1.0), "Euler {'shift': 1.0, 'eta': 0.0, 'told': 1.0}"),
        (samplers.Jumps(), "Jumps {}"),
        (samplers.Renoise(), "Renoise {}"),
        (samplers.Multistep("unipc"), "Multistep {'method': 'unipc', 'shift': 1.0}"),
        (samplers.RungeKutta("heun", 3.0), "RungeKutta {'method': 'heun', 'shift': 3.0}"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_samplers_in_protocols(sampler, settings):
    sampler.unrelated = "an attribute that decides nothing"
    assert f"{sampler.kind} {sampler.settings()}" == settings


def test_networks_in_headers():
    assert list(CLASSES) == ["DiT", "DiTMoE"]
    with safe_open(ASSETS / "emoji" / "base.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["ditune"])
    assert header["class"] == "DiT"
    assert header["provenance"]["autoencoder_name"] == "kl_emoji"


def test_record_of_the_shipped_bases():
    """Measures that runs of this version find; studies of other styles add theirs."""
    record = json.loads((ASSETS / "emoji" / "base_record.json").read_text(encoding="utf-8"))["metrics"]
    found = {key[:12]: set(values) for key, values in record.items()}
    assert found["831be0c796a3"] >= {"02f245c86b320115", "e265a85ca7afdb52"}
    assert found["84270fdb7903"] >= {
        *("042dc3c7fe7cdea7", "547aeb79eb28c04e", "93f2117698e8ed54", "9887d0fd081f48ff"),  # of 256 images
        *("efe9a7ea417581bc", "f25aa55350e96b7a"),
        *("7e595fe67f0ed290", "f5222a9131e4cf5a", "6ecc421587eeb813"),  # emoji_openmoji, emoji_base, emoji_fluent_color
    }
