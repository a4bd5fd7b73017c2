"""Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): a mixture of experts from a dense network.

The new network initially computes the same function. DiT-MoE's own conversion starts at a third of the dense network's
output, because the chosen scores do not sum to one. Here they are renormalised, so that equal experts have the output
of one of them.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.networks import DiT, DiTMoE
from ditune.networks.dit_moe import MoEBlock
from ditune.rng import seeded

# weight of the experts: layer of a dense MLP, whose matrices are transposed
MLP = {"w_in_EDF": "fc1.weight", "bias_in_EF": "fc1.bias", "w_out_EFD": "fc2.weight", "bias_out_ED": "fc2.bias"}


def upcycle(network: DiT, num_experts: int, top_k: int, seed: int = 0, noise: float = 0.0, **options: Any) -> DiTMoE:
    """A DiT-MoE whose experts are copies of the network's MLPs, or of the single expert of a DiT-MoE.

    Args:
        network: a DiT, or a DiT-MoE of one expert, which keeps its blocks and shared experts.
        num_experts, top_k: E and k.
        seed: of the routers (std 0.02) and of the noise.
        noise: standard deviation of the noise on the copies, relative to that of each weight; 0 = equal copies.
        **options: shared_ratio, moe_every, moe_from of `DiTMoE`, only for a DiT. New shared experts initially have zero
            output.

    Raises:
        UserError: the network has several experts, or a routing under which copies would change its function.
    """
    renormalize = True if top_k > 1 else "always"  # else a single expert's weight would be its score
    config = network.config | {"num_experts": num_experts, "top_k": top_k, "renormalize": renormalize}
    if isinstance(network, DiTMoE):
        _check_one_expert(network, options)
    else:
        config |= {"expert": "gelu", "expert_ratio": config["mlp_ratio"], **options}
    with seeded(seed):
        try:
            made = DiTMoE(**config)
        except ValueError as error:
            raise UserError(f"There is no such DiT-MoE: {error}.") from error
        # all but the second branches of the blocks
        kept = {k: v for k, v in network.state_dict().items() if not re.match(r"blocks\.\d+\.(mlp|moe)\.", k)}
        own = made.state_dict() | kept
        for i, block in enumerate(made.blocks):
            own |= {f"blocks.{i}.{name}": value for name, value in _block(block, network.blocks[i], noise).items()}
    made.load_state_dict(own)
    return made.train(network.training)


def _check_one_expert(network: DiTMoE, options: dict[str, Any]) -> None:
    config = network.config
    if config["num_experts"] != 1:
        raise UserError(
            f"The network has {config['num_experts']} experts already. Give a dense one, or one of one expert."
        )
    sums_to_one = config["score"] == "softmax" or config["renormalize"]
    if not sums_to_one or config["choice"] != "token":
        raise UserError(
            f"The network has score={config['score']!r} and choice={config['choice']!r}, so an expert's weight depends "
            "on the token. Give a network with softmax scores and choice='token'."
        )
    if options:
        raise UserError(f"A DiT-MoE keeps its own {', '.join(options)}. Leave them out.")


def _block(block: nn.Module, old: nn.Module, noise: float) -> dict[str, Tensor]:
    """Weights of a block's second branch, by their names in the block."""
    if not isinstance(block, MoEBlock):
        return {f"mlp.{name}": value for name, value in old.mlp.state_dict().items()}
    experts = block.moe.experts
    nn.init.normal_(block.moe.router.weight, std=0.02)
    weights = {"moe.router.weight": block.moe.router.weight.detach()}
    if isinstance(old, MoEBlock):
        source = {name: value[0] for name, value in old.moe.experts.state_dict().items()}
        shared = old.moe.shared_experts.state_dict() if old.moe.shared_experts else {}
        weights |= {f"moe.shared_experts.{name}": value for name, value in shared.items()}
    else:
        dense = old.mlp.state_dict()
        source = {name: dense[layer].T if dense[layer].ndim == 2 else dense[layer] for name, layer in MLP.items()}
        if block.moe.shared_experts is not None:
            name = "moe.shared_experts.down_proj.weight"
            weights[name] = torch.zeros_like(block.moe.shared_experts.down_proj.weight)
    for name, value in source.items():
        copies = value.expand_as(getattr(experts, name)).clone()
        if noise:
            copies += noise * value.std() * torch.randn_like(copies)
        weights[f"moe.experts.{name}"] = copies
    return weights
