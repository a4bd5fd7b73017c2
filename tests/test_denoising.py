"""The loss on unseen pictures repeats whatever else has been computed, and a worse network has a higher one."""

import torch
from helpers import SMALL, compose

from ditune.build import build_parts, make
from ditune.denoising import denoising_loss


def test_loss_tells_networks_apart_and_repeats(tmp_path, pictures):
    cfg = compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full")
    parts = build_parts(cfg)
    unseen = make(cfg.data.pictures, "data", split="test")
    assert len(unseen) == 2

    def loss(seed: int = 0) -> float:
        return denoising_loss(parts.network, parts.objective, parts.autoencoder, unseen, seed, bf16=False)

    torch.nn.init.normal_(parts.network.final_layer.linear.weight, std=0.1)  # else the output is zero for any noise
    first = loss()
    torch.rand(3)  # moves the global generator, which must not matter
    assert loss() == first
    assert loss(seed=1) != first
    with torch.no_grad():
        parts.network.final_layer.linear.bias += 10.0  # predicts x_0 far off
    assert loss() > first + 50
