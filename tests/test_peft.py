"""What every method promises, on every network: what trains, how much of it, and what comes back from its files."""

import pytest
import torch

from ditune.networks import build_network
from ditune.peft import build_peft

# Trainable parameters of DiT-XL/2 on Food-101. The first six are the DiffFit paper's Table 1 to its digits
# (673.8M, 0.61M, 1.15M, 2.18M, 4.28M, 4.28M; 0.83M with affine norms); its VPT-Deep (2.81M) is not reproduced.
COUNTS = [
    ("full", {}, 673_799_072),
    ("bitfit", {}, 607_136),
    ("adaptformer", {}, 4_280_320),
    ("adapter", {}, 4_280_320),
    ("difffit", {"affine_norms": True}, 832_928),
    ("difffit", {}, 703_904),  # the public re-implementations
    ("difffit", {"gamma_depth": 28}, 800_672),
    ("difffit", {"gammas": ["qkv"]}, 607_136 + 14 * 3 * 1152),
    ("difffit", {"gammas": ["proj"]}, 607_136 + 14 * 1152),
    ("difffit", {"gammas": ["branches"]}, 607_136 + 14 * 2 * 1152),
    ("vpt_deep", {"num_prompts": 50}, 1_612_800 + 102 * 1152),
    ("vpt_shallow", {"num_prompts": 50}, 50 * 1152 + 102 * 1152),
    ("norm", {}, 28 * 4 * 1152 + 102 * 1152),
    ("norm", {"adaln": True}, 28 * 4 * 1152 + 102 * 1152 + (28 * 6 + 2) * (1152 + 1) * 1152),
]


@pytest.mark.parametrize(("name", "arguments", "count"), COUNTS)
def test_parameters_that_train_of_xl_2_on_food101(name, arguments, count):
    with torch.device("meta"):
        network, method = build_network("dit_xl_2", num_classes=101), build_peft(name, lr=1e-3, **arguments)
        method.apply(network)
    assert sum(p.numel() for p in method.trainable(network).values()) == count
