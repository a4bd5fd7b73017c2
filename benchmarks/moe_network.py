"""A training step of a whole network with experts, beside a dense one of equal active weights and the original's layer.

    python benchmarks/moe_network.py [--device cuda] [--depth 4] [--batch 4] [--out docs/results/speed]

DiT-MoE-S's layers (8 experts, two for each token, and two shared ones) for latents of 256 px: loss and backward pass of
full fine-tuning in fp32. The layer of the original and the dense one are in moe_layer.py; attention, embeddings and
loss are ours in all three.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from measuring import Step, Variant, deliver, measured, parser
from moe_layer import SHARED, D, DenseSwiGLU, E, F, K, OriginalLayer
from torch import Tensor, nn
from train_step import made_batch

from ditune.networks import DiT, DiTMoE
from ditune.objectives import GaussianDiffusion
from ditune.processes import GaussianProcess
from ditune.rng import StepRandom

REFERENCE = "the original's layers"
COLUMNS = {
    "name": ("", "text"),
    "ms": ("ms", "ms"),
    "ratio": ("speed-up", "x"),
    "least": ("least", "x"),
    "most": ("most", "x"),
    "of_dense": ("of dense", "float"),
    "images_per_s": ("images/s", "float"),
    "peak_mib": ("peak MiB", "int"),
}


class Dense(DenseSwiGLU):
    """As a block's branch: tokens alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def network_of(depth: int, layer: Callable[[], nn.Module] | None, experts: bool) -> DiT:
    """A network with our experts, or with another layer in their place."""
    torch.manual_seed(0)
    size = {"input_size": 32, "hidden_size": D, "depth": depth, "num_heads": 6, "num_classes": 1000}
    ratios = {"num_experts": E, "top_k": K, "expert_ratio": F / D, "shared_ratio": SHARED / D}
    network = DiTMoE(**size, **ratios) if experts else DiT(**size)
    for block in network.blocks if layer is not None else ():
        setattr(block, block.mlp_key, layer())
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return network


def step_of(network: Callable[[], DiT], batch: int, device: str) -> Step:
    """Loss and backward pass, all weights with gradients."""
    made, data = network().to(device), made_batch(batch, 256, device)
    objective, random = GaussianDiffusion(GaussianProcess()), StepRandom(0, 0, range(batch), device)

    def step() -> None:
        objective.loss(made, data, random).total.backward()
        made.zero_grad()

    return step


def variants(given: argparse.Namespace) -> list[Variant]:
    """Rows of the table."""
    networks = {
        REFERENCE: partial(network_of, given.depth, OriginalLayer, True),
        "ours": partial(network_of, given.depth, None, True),
        "dense of the same work": partial(network_of, given.depth, partial(Dense, K * F + SHARED), False),
    }
    return [
        Variant(name, partial(step_of, network, given.batch, given.device), given.batch)
        for name, network in networks.items()
    ]


def main(arguments: Sequence[str] | None = None) -> dict:
    """Measure, print, and write; returns the result."""
    options = parser(__doc__, seconds=60, rounds=5)
    options.add_argument("--depth", type=int, default=4, help="blocks")
    options.add_argument("--batch", type=int, default=4)
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measured(variants(given), given, REFERENCE, memory=True)
    dense = rows[-1].get("ms")
    for row in rows:
        if "ms" in row:
            row["of_dense"] = row["ms"] / dense
    return deliver("moe_network", given, COLUMNS, rows)


if __name__ == "__main__":
    main()
