"""DiffFit (Xie et al., arXiv 2304.06648): biases, norms, label table and new scale factors gamma train.

What trains follows Fig. 4 of the paper. The places of gamma follow the two public re-implementations on DiT
(thuml/Diffusion-Tuning and vimar-gu/MinimaxDiffusion), whose outputs are equal to the bit.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ditune.errors import UserError
from ditune.peft.base import PeftMethod
from ditune.peft.norm import add_affine_norms, fold_affine_norms, ones

GAMMAS = ("qkv", "proj", "branches")


class DiffFit(PeftMethod):
    """Scales per channel, initially 1, on qkv (3D), the attention's output (D) and both residual branches (D each).

    Args:
        lr, weight_decay, train_labels: see `PeftMethod`.
        gamma_depth: number of blocks with gammas, from the input; None = the first half, 14 of 28 in DiT-XL.
        gammas: their places in these blocks, of `GAMMAS`.
        affine_norms: norm1 and norm2 of every block get a trained weight and bias (the paper's "LN"; DiT has none).

    Raises:
        UserError: an unknown place.
    """

    path = ("gamma", "norm")
    sums = "parameters"

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        train_labels: bool = True,
        gamma_depth: int | None = None,
        gammas: Sequence[str] = GAMMAS,
        affine_norms: bool = False,
    ):
        super().__init__(lr, weight_decay, train_labels)
        unknown = sorted(set(gammas) - set(GAMMAS))
        if unknown:
            raise UserError(f"peft.gammas has {', '.join(unknown)}. Choose of {', '.join(GAMMAS)}.")
        self.gamma_depth, self.gammas, self.affine_norms = gamma_depth, tuple(gammas), affine_norms

    def selects(self, name: str) -> bool:
        """Biases, norms and gammas."""
        return any(word in name for word in ("bias", "norm", "gamma"))

    def inject(self, network: nn.Module) -> None:
        """Add gammas of ones, and the norms' weights and biases.

        Raises:
            UserError: `gamma_depth` is not between 0 and the number of blocks.
        """
        depth = len(network.blocks)
        gamma_depth = depth // 2 if self.gamma_depth is None else self.gamma_depth
        if not 0 <= gamma_depth <= depth:
            raise UserError(f"peft.gamma_depth is {gamma_depth}, the network has {depth} blocks. Set 0 to {depth}.")
        for block in network.blocks[:gamma_depth]:
            qkv, proj = block.attn.qkv, block.attn.proj
            if "qkv" in self.gammas:
                block.attn.gamma1 = ones(qkv.out_features, qkv.weight)
            if "proj" in self.gammas:
                block.attn.gamma2 = ones(proj.out_features, proj.weight)
            if "branches" in self.gammas:
                block.gamma1 = ones(proj.out_features, proj.weight)
                block.gamma2 = ones(proj.out_features, proj.weight)
        if self.affine_norms:
            add_affine_norms(network)

    def fold(self, network: nn.Module) -> None:
        """Multiply the gammas into the linear layers before them."""
        for block in network.blocks:
            _scale_rows(block.attn.qkv, block.attn.gamma1)
            _scale_rows(block.attn.proj, block.attn.gamma2)
            _scale_rows(block.attn.proj, block.gamma1)
            if hasattr(block, "mlp"):
                _scale_rows(block.mlp.fc2, block.gamma2)
            else:  # no single layer's rows are the output of all experts: fold into the branch's adaLN gate
                _scale_rows(block.adaLN_modulation[1], block.gamma2, slice(-block.attn.proj.out_features, None))
            block.attn.gamma1 = block.attn.gamma2 = block.gamma1 = block.gamma2 = None
        if self.affine_norms:
            fold_affine_norms(network)


def _scale_rows(linear: nn.Linear, gamma: Tensor | None, rows: slice = slice(None)) -> None:
    """gamma * (W x + b) as one linear layer, for all of its rows or a slice of them."""
    if gamma is not None:
        linear.weight[rows] *= gamma[:, None]
        linear.bias[rows] *= gamma
