"""Norm tuning: a trained weight and bias on the LayerNorms of every block, which have none in DiT."""

import torch
from torch import Tensor, nn

from ditune.peft.base import PeftMethod


class NormTuning(PeftMethod):
    """Affine norm1 and norm2 in every block.

    Args:
        lr, weight_decay, train_labels: see `PeftMethod`.
        adaln: the adaLN layers train too, weights and biases (a third of DiT's parameters).
    """

    path = ("norm",)
    sums = "parameters"

    def __init__(self, lr: float, weight_decay: float = 0.0, train_labels: bool = True, adaln: bool = False):
        super().__init__(lr, weight_decay, train_labels)
        self.adaln = adaln

    def selects(self, name: str) -> bool:
        """The norms, and with `adaln` the adaLN layers."""
        return "norm" in name or (self.adaln and "adaLN_modulation" in name)

    def inject(self, network: nn.Module) -> None:
        """Make the norms affine."""
        add_affine_norms(network)

    def fold(self, network: nn.Module) -> None:
        """Fold the norms into the adaLN layers."""
        fold_affine_norms(network)


def ones(size: int, like: Tensor) -> nn.Parameter:
    """A parameter of ones (size,), fp32, on the device of `like`."""
    return nn.Parameter(torch.ones(size, device=like.device, dtype=torch.float32))


def add_affine_norms(network: nn.Module) -> None:
    """Give norm1 and norm2 of every block a weight of ones and a bias of zeros."""
    for norm in (norm for block in network.blocks for norm in (block.norm1, block.norm2)):
        norm.weight = ones(norm.normalized_shape[0], network.x_embedder.proj.weight)
        norm.bias = nn.Parameter(torch.zeros_like(norm.weight))


def fold_affine_norms(network: nn.Module) -> None:
    """Fold the weights and biases of `add_affine_norms` into the adaLN layers, exactly, and remove them."""
    shift_msa, scale_msa, _, shift_mlp, scale_mlp, _ = range(6)
    for block in network.blocks:
        modulation = block.adaLN_modulation[1]
        _fold_norm(block.norm1, modulation, shift_msa, scale_msa)
        _fold_norm(block.norm2, modulation, shift_mlp, scale_mlp)


def _fold_norm(norm: nn.LayerNorm, modulation: nn.Linear, shift: int, scale: int) -> None:
    """(w*n + b)(1 + s) + h  =  n(1 + s') + h'  with  s' = w*s + w - 1  and  h' = h + b(1 + s)."""
    w, b, size = norm.weight, norm.bias, norm.normalized_shape[0]
    rows = [slice(k * size, (k + 1) * size) for k in (shift, scale)]
    (w_h, w_s), (b_h, b_s) = ([part[r] for r in rows] for part in (modulation.weight, modulation.bias))
    w_h += b[:, None] * w_s
    b_h += b * (1 + b_s)
    w_s *= w[:, None]
    b_s.copy_(w * b_s + w - 1)
    norm.weight = norm.bias = None
