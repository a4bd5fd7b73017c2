"""The transformer block of DiT with adaLN-Zero conditioning (Peebles & Xie, arXiv 2212.09748).

N batch, T tokens, D hidden size, H heads.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditune.networks.kept import GateScale, NormModulate, is_plain, keeps_less


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (N, T, D), (N, D), (N, D) -> (N, T, D)
    """x (1 + scale) + shift per channel, the adaptive part of adaLN (arXiv 2212.09748, section 3.2)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def norm_modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` of a norm's output; x (N, T, D), shift and scale (N, D) -> (N, T, D)."""
    if keeps_less(x) and is_plain(norm):
        return NormModulate.apply(x, shift, scale, norm.eps)
    return modulate(norm(x), shift, scale)


def apply_gamma(x: Tensor, gamma: Tensor | None) -> Tensor:
    """x (..., D) times DiffFit's scale gamma (D,) (arXiv 2304.06648, Fig. 4); None = x itself."""
    return x if gamma is None else x * gamma


def add_branch(x: Tensor, branch: Tensor, gate: Tensor, gamma: Tensor | None) -> Tensor:
    """x + gate branch gamma: the residual sum of x and a branch, (N, T, D) each; gate (N, D), gamma (D,) or None."""
    if gamma is not None and keeps_less(x):
        return x + GateScale.apply(branch, gate, gamma)
    return x + apply_gamma(gate[:, None] * branch, gamma)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 3 x (N, H, T, D/H) -> (N, H, T, D/H)
    """Softmax attention by the fastest back end for the device, dtype and length.

    On CPUs in bf16 the explicit product is faster than the fused kernel up to about 256 tokens (docs/results/speed.md).

    Args:
        q, k, v: (N, H, T, D/H).

    Returns:
        (N, H, T, D/H).
    """
    reduced = torch.is_autocast_enabled(q.device.type) or q.dtype != torch.float32
    if q.device.type == "cpu" and reduced and q.shape[-2] <= 256 and torch.is_grad_enabled():
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return weights.softmax(dim=-1).to(v.dtype) @ v
    return scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values.

    Args:
        hidden_size: D.
        num_heads: H.
        qk_norm: LayerNorm on the queries and keys of each head.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.register_parameter("gamma1", None)  # (3D,), scales qkv: added by DiffFit
        self.register_parameter("gamma2", None)  # (D,), scales the output: added by DiffFit

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        """All tokens of an image attend to each other."""
        qkv = apply_gamma(self.qkv(x), self.gamma1)
        q, k, v = rearrange(qkv, "n t (three h d) -> three n h t d", three=3, h=self.num_heads)
        x = rearrange(attention(self.q_norm(q), self.k_norm(k), v), "n h t d -> n t (h d)")
        return apply_gamma(self.proj(x), self.gamma2)


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between them.

    Args:
        hidden_size: D, width of input and output.
        mlp_size: width between the layers.
    """

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        """Each token by itself."""
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP with adaLN-Zero: shift, scale and gate of each branch come from the condition c.

    Args:
        hidden_size: D.
        num_heads: H.
        mlp: the second branch, (N, T, D) -> (N, T, D). A mixture of experts also returns its routing.
        qk_norm: see `Attention`.
    """

    mlp_key = "mlp"  # name of the second branch in the state dict

    def __init__(self, hidden_size: int, num_heads: int, mlp: nn.Module, qk_norm: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.add_module(self.mlp_key, mlp)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.register_parameter("gamma1", None)  # (D,), scales the attention branch: added by DiffFit
        self.register_parameter("gamma2", None)  # (D,), scales the MLP branch: added by DiffFit

    def forward(self, x: Tensor, c: Tensor, *time: Tensor) -> Any:
        """Tokens x (N, T, D) and condition c (N, D) to tokens (N, T, D), or to (tokens, routing) with experts.

        The network's time (N,) follows where experts are chosen by it; blocks without experts ignore it.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        branch = self.attend(x, shift_msa, scale_msa)  # (N, T, D)
        x = add_branch(x, branch, gate_msa, self.gamma1)
        output = self.transform(x, shift_mlp, scale_mlp, *time)
        branch, *routing = output if isinstance(output, tuple) else (output,)  # (N, T, D)
        x = add_branch(x, branch, gate_mlp, self.gamma2)
        return (x, *routing) if routing else x

    def attend(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (N, T, D), 2 x (N, D) -> (N, T, D)
        """The attention branch before its gate."""
        return self.attn(norm_modulate(self.norm1, x, shift, scale))

    def transform(self, x: Tensor, shift: Tensor, scale: Tensor, *_: Tensor) -> Any:  # (N, T, D) -> (N, T, D)
        """The MLP branch before its gate; (tokens, routing) with experts."""
        return getattr(self, self.mlp_key)(norm_modulate(self.norm2, x, shift, scale))
