"""The seven further drawing styles of the emoji, and the decoder that was trained on them."""

import hashlib
from collections import Counter

import pytest
import torch

from ditune.config.instantiate import instantiate
from ditune.data import from_uint8
from helpers import ROOT, compose

# images to train on and to test, and classes that have an image at all
STYLES = {
    "fluent_color": (1410, 183, 95),
    "fluent_flat": (1412, 183, 95),
    "noto_v1": (1078, 144, 96),
    "emojione2": (965, 133, 95),
    "fxemoji": (528, 63, 79),
    "streamline": (336, 42, 68),
    "openmoji": (1688, 218, 98),
}


@pytest.mark.parametrize("name", STYLES)
def test_images_classes_and_splits(name, tmp_path):
    cfg = compose(tmp_path, f"data=emoji_{name}", "autoencoder=kl_emoji_styles")
    train, test = (instantiate(cfg.data.pictures, "data", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == STYLES[name][:2]
    assert len(train.class_names) == 98
    assert len({item.class_name for item in train.everything}) == STYLES[name][2]
    # an emoji is in the same split in every style, so none that is tested on was trained on in another style
    base = instantiate(compose(tmp_path, "data=emoji_base").data.pictures, "data", split=None)
    splits = {row["codepoint"]: row["split"] for row in base.rows}
    assert all(splits[row["codepoint"]] == "train" for row in train.rows)
    assert Counter(row["split"] for row in test.rows) == {"test": len(test)}


def test_the_assets_are_those_that_are_written_down():
    for line in (ROOT / "assets" / "SHA256SUMS").read_text().splitlines():
        written, path = line.split()
        assert hashlib.sha256((ROOT / "assets" / path).read_bytes()).hexdigest() == written, path
        assert path.endswith("config.json") or written in (ROOT / "assets" / "README.md").read_text(), path


def test_the_decoder_is_another_and_the_latents_are_the_same(tmp_path):
    one, other = (
        instantiate(compose(tmp_path, f"autoencoder={name}").autoencoder, "autoencoder")
        for name in ("kl_emoji", "kl_emoji_styles")
    )
    assert one.latent_fingerprint == other.latent_fingerprint
    assert one.fingerprint != other.fingerprint
    cfg = compose(tmp_path, "data=emoji_fluent_color")
    images = instantiate(cfg.data.pictures, "data", split="test", limit=32)
    x = from_uint8(images.load())
    with torch.inference_mode():
        z = one.to_latent(x)
        assert torch.equal(z, other.to_latent(x))
        errors = [(autoencoder.to_pixels(z) - x).square().mean().item() for autoencoder in (one, other)]
    assert errors[1] < 0.9 * errors[0]  # a style that kl_emoji has not seen
