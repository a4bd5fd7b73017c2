"""DiffFit (Xie et al., arXiv 2304.06648): biases, norms, label table and new scale factors gamma train.

The paper's Fig. 4 gives what trains; where gamma goes follows the two public re-implementations on DiT
(thuml/Diffusion-Tuning and vimar-gu/MinimaxDiffusion), which agree to the bit.
"""

import torch
from torch import Tensor, nn

from ditune.errors import UserError

from .base import PeftMethod


class DiffFit(PeftMethod):
    """Scales per channel on qkv (3D), on the attention's output (D) and on both residual branches (D each).

    Args:
        gamma_depth: blocks that get gammas, counted from the input; None = the first half, as 14 of 28 in DiT-XL.
        affine_norms: norm1 and norm2 of every block get a trained weight and bias (the paper's "LN"; DiT has none).
        lr, weight_decay, train_labels: see `PeftMethod`.
    """

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        train_labels: bool = True,
        gamma_depth: int | None = None,
        affine_norms: bool = False,
    ):
        super().__init__(lr, weight_decay, train_labels)
        self.gamma_depth, self.affine_norms = gamma_depth, affine_norms

    def selects(self, name: str) -> bool:
        return any(word in name for word in ("bias", "norm", "gamma"))

    def inject(self, network: nn.Module) -> None:
        depth = len(network.blocks)
        gamma_depth = depth // 2 if self.gamma_depth is None else self.gamma_depth
        if not 0 <= gamma_depth <= depth:
            raise UserError(f"peft.gamma_depth is {gamma_depth}, the network has {depth} blocks. Set 0 to {depth}.")
        for block in network.blocks[:gamma_depth]:
            qkv, proj = block.attn.qkv, block.attn.proj
            block.attn.gamma1 = _ones(qkv.out_features, qkv.weight)
            block.attn.gamma2 = _ones(proj.out_features, proj.weight)
            block.gamma1 = _ones(proj.out_features, proj.weight)
            block.gamma2 = _ones(block.mlp.fc2.out_features, proj.weight)
        if self.affine_norms:
            for norm in (norm for block in network.blocks for norm in (block.norm1, block.norm2)):
                norm.weight = _ones(norm.normalized_shape[0], network.blocks[0].attn.proj.weight)
                norm.bias = nn.Parameter(torch.zeros_like(norm.weight))

    def fold(self, network: nn.Module) -> None:
        for block in network.blocks:
            if block.gamma1 is not None:
                _scale_rows(block.attn.qkv, block.attn.gamma1)
                _scale_rows(block.attn.proj, block.gamma1 * block.attn.gamma2)
                _scale_rows(block.mlp.fc2, block.gamma2)
                block.attn.gamma1 = block.attn.gamma2 = block.gamma1 = block.gamma2 = None
            if self.affine_norms:
                modulation = block.adaLN_modulation[1]
                shift_msa, scale_msa, _, shift_mlp, scale_mlp, _ = range(6)
                _fold_norm(block.norm1, modulation, shift_msa, scale_msa)
                _fold_norm(block.norm2, modulation, shift_mlp, scale_mlp)


def _ones(size: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.ones(size, device=like.device, dtype=torch.float32))


def _scale_rows(linear: nn.Linear, gamma: Tensor) -> None:
    """gamma * (W x + b) as one linear layer."""
    linear.weight.mul_(gamma[:, None])
    linear.bias.mul_(gamma)


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
