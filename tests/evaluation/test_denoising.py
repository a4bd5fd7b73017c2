"""The loss on unseen pictures repeats whatever else has been computed, and a worse network has a higher one."""

import logging

import torch

from ditune import progress
from ditune.config.components import build_components
from ditune.config.instantiate import instantiate
from ditune.data import from_uint8
from ditune.evaluation.denoising_loss import REPEATS, denoising_loss
from ditune.evaluation.held_out import EncodedHeldOut
from ditune.rng import Draws
from helpers import SMALL, compose, open_gates


def test_loss_tells_networks_apart_and_repeats(tmp_path, pictures):
    cfg = compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full")
    parts = build_components(cfg)
    unseen = EncodedHeldOut(instantiate(cfg.data.pictures, "data", split="test"), parts.autoencoder)
    assert len(unseen) == 2

    def loss(seed: int = 0) -> float:
        return denoising_loss(parts.network, parts.objective, unseen, seed, bf16=False)

    torch.nn.init.normal_(parts.network.final_layer.linear.weight, std=0.1)  # else the output is zero for any noise
    first = loss()
    torch.rand(3)  # moves the global generator, which must not matter
    assert loss() == first
    assert loss(seed=1) != first
    with torch.no_grad():
        parts.network.final_layer.linear.bias += 10.0  # predicts x_0 far off
    assert loss() > first + 50


def test_progress_moves_with_every_noise_level_of_a_batch(tmp_path, pictures, monkeypatch, caplog):
    monkeypatch.setattr(progress, "MOMENT", 0.0)
    cfg = compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full")
    parts = build_components(cfg)
    images = instantiate(cfg.data.pictures, "data", split="test")
    caplog.set_level(logging.INFO)
    denoising_loss(parts.network, parts.objective, EncodedHeldOut(images, parts.autoencoder), 0, bf16=False)
    lines = [record.getMessage() for record in caplog.records if "held-out" in record.getMessage()]
    assert [line.split(",")[0] for line in lines[:-1]] == [
        f"loss on held-out images: {done} of 8 noised images" for done in (2, 4, 6, 8)
    ]
    assert all(line.endswith(" left") for line in lines[:-1])


def test_every_image_is_encoded_once_and_the_value_stays(tmp_path, pictures, monkeypatch):
    cfg = compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full")
    parts = build_components(cfg)
    open_gates(parts.network)
    images = instantiate(cfg.data.pictures, "data", split="train")
    monkeypatch.setattr("ditune.evaluation.denoising_loss.BATCH", 4)  # 4, 4 and 2 images
    encoded, encode = [], type(parts.autoencoder).encode
    monkeypatch.setattr(type(parts.autoencoder), "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    source = EncodedHeldOut(images, parts.autoencoder)
    found = denoising_loss(parts.network, parts.objective, source, 0, bf16=False)
    assert encoded == [4, 4, 2]
    assert denoising_loss(parts.network, parts.objective, source, 0, bf16=False) == found
    assert encoded == [4, 4, 2]  # the next network finds them encoded
    losses = []  # as it was: every repeat encodes anew, the losses in this order
    with torch.inference_mode():
        for repeat in range(REPEATS):
            for start in (0, 4, 8):
                rows = range(start, min(start + 4, len(images)))
                batch, y = images.__getitems__(rows)
                x0 = parts.autoencoder.to_latent(from_uint8(batch))
                losses.append(parts.objective.denoising(parts.network, (x0, y), Draws(0, repeat, rows, "cpu")))
    assert found == torch.cat(losses).double().mean().item()
