"""Element-wise parts of a block that keep less for the backward pass than autograd does, with the same bits.

Autograd keeps both factors of every product whose factors have gradients. These keep the first tensor alone and compute
the other factor again from it, by the same operations. N batch, T tokens, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def keeps_less(x: Tensor) -> bool:
    """Whether the functions below apply to a block's input.

    A compiler decides by itself what it computes again. Transforms such as torch.func.jvp know plain operations only,
    and autocast would cast what is not fp32.

    Args:
        x: (N, T, D).
    """
    return (
        torch.is_grad_enabled()
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def is_plain(norm: nn.Module) -> bool:
    """Whether a norm is a LayerNorm without weights that nobody listens to."""
    return type(norm) is nn.LayerNorm and norm.weight is None and not norm._forward_hooks


class NormModulate(torch.autograd.Function):
    """LayerNorm without weights, then n (1 + scale) + shift. It keeps x, and not the normalised n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """Tokens x (N, T, D), shift and scale (N, D) to (N, T, D)."""
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.eps = eps
        return normed * (1 + scale[:, None]) + shift[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, shift and scale."""
        x, scale, mean, rstd = ctx.saved_tensors
        of_x = of_shift = of_scale = None
        if ctx.needs_input_grad[0]:
            inner, only_x = grad * (1 + scale[:, None]), [True, False, False]
            of_x = torch.ops.aten.native_layer_norm_backward(inner, x, x.shape[-1:], mean, rstd, None, None, only_x)[0]
        if ctx.needs_input_grad[1]:
            of_shift = grad.sum(dim=1)
        if ctx.needs_input_grad[2]:
            normed = torch.native_layer_norm(x, x.shape[-1:], None, None, ctx.eps)[0]
            of_scale = (grad * normed).sum(dim=1)
        return of_x, of_shift, of_scale, None


class GateScale(torch.autograd.Function):
    """gate x gamma: a branch's gate, and DiffFit's scale. It keeps x, and not gate x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, gamma: Tensor) -> Tensor:
        """The branch x (N, T, D), gate (N, D) and gamma (D,) to (N, T, D)."""
        ctx.save_for_backward(x, gate, gamma)
        return gate[:, None] * x * gamma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gate and gamma."""
        x, gate, gamma = ctx.saved_tensors
        of_x = of_gate = of_gamma = None
        inner = (grad * gamma).to(torch.result_type(gate, x))  # gate x is bf16 under autocast, gamma is not
        if ctx.needs_input_grad[0]:
            of_x = inner * gate[:, None]
        if ctx.needs_input_grad[1]:
            of_gate = (inner * x).sum(dim=1)
        if ctx.needs_input_grad[2]:
            of_gamma = (grad * (gate[:, None] * x)).sum(dim=(0, 1))
        return of_x, of_gate, of_gamma
