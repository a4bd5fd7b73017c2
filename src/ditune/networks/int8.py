"""Frozen weights in int8: a quarter of the memory of fp32, half of that of bf16. Adapters train beside them in fp32.

W ~ diag(s) Q with Q in -127..127 and s_i = max_j |W_ij| / 127 of each output channel: symmetric rounding, as in
LLM.int8() (arXiv 2208.07339, section 2.1). W is put together where it is used, and again in the backward pass.

The weight-only form of torchao computes above autograd, which keeps W in floating point of every layer until the
backward pass. It needs the function below as well, and then nothing of it is left but the rounding.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ditune.networks.moe import Experts, numbers

LEVELS = 127  # of an int8 number, and of its negative


class Product(torch.autograd.Function):
    """x W^T + b, of which x and b get gradients. It keeps Q and s, and neither W nor x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """x (R, D_in), Q (D_out, D_in), s (D_out,) and b (D_out,) to (R, D_out)."""
        ctx.save_for_backward(values, scale)
        return linear(x, dequantised(values, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and b."""
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ dequantised(*ctx.saved_tensors, grad.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = grad.sum(dim=0)
        return of_x, None, None, of_bias


def product(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the type of autocast, else of x; see `Product`."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    # torch.func.jvp knows plain operations only
    if torch._C._are_functorch_transforms_active():
        return linear(x, dequantised(values, scale, x.dtype), bias)
    y = Product.apply(x.flatten(0, -2), values, scale, bias)  # no view, since some adapters add to it in place
    return y.view(*x.shape[:-1], len(values))


class Int8Linear(nn.Linear):
    """A linear layer whose weight is Q, and whose bias may train. Ordinary layers become one in `quantise`."""

    scale: Tensor  # (D_out,) fp32

    def forward(self, x: Tensor) -> Tensor:  # (..., D_in) -> (..., D_out)
        """The layer's output."""
        return product(x, self.weight, self.scale, self.bias)

    def dequantised(self) -> Tensor:
        """W (D_out, D_in) in fp32."""
        return dequantised(self.weight, self.scale, torch.float32)


class Int8Experts(Experts):
    """Experts whose matrices are Q, computed one after another. Ordinary ones become these in `quantise`."""

    def forward(self, x_SD: Tensor, counts_E: Tensor) -> Tensor:  # (S, D), (E,) -> (S, D)
        """Each row by its expert, see `Experts.forward`."""
        if torch.is_autocast_enabled(x_SD.device.type):
            x_SD = x_SD.to(torch.get_autocast_dtype(x_SD.device.type))
        rows = x_SD.split(numbers(counts_E, len(x_SD)))
        weights = zip(*(self._of_each(name, x_SD.dtype) for name in self.names), strict=True)
        own = zip(rows, weights, strict=True)
        return torch.cat([self.form(lambda x, pair: product(x, *pair), x_RD, *w) for x_RD, w in own])

    def _of_each(self, name: str, dtype: torch.dtype) -> Iterable[Any]:
        """Of each expert: the pair of Q and s of its matrix, or its bias."""
        weight = getattr(self, name)
        if weight.ndim == 2:
            return weight.to(dtype).unbind()
        return zip(weight.transpose(1, 2).unbind(), getattr(self, f"{name}_scale").unbind(), strict=True)


def dequantised(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W = diag(s) Q (..., D_out, D_in): the product in fp32, rounded to the type."""
    return (values * scale[..., None]).to(dtype)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q (..., D_out, D_in) int8 and s (..., D_out) fp32 of a weight; a row of zeros has the scale 1."""
    weight = weight.float()
    scale = weight.abs().amax(dim=-1) / LEVELS
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[..., None]).round().to(torch.int8), scale


@torch.no_grad()
def quantise(network: nn.Module) -> None:
    """Round the weights of the blocks' linear layers and experts that do not train.

    Layers change in place, class included, as `fully_shard` does it: a method and its dial hold references to them.

    Args:
        network: with its method applied; it is on the CPU, or on the meta device.
    """
    for layer in network.blocks.modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            layer.weight.data, scale = quantised(layer.weight.data)
            layer.register_buffer("scale", scale, persistent=False)
            layer.__class__ = Int8Linear
        elif type(layer) is Experts:
            matrices = {name: p for name, p in layer.named_parameters() if p.ndim == 3}  # (E, D_in, D_out)
            if any(p.requires_grad for p in matrices.values()):
                continue
            for name, parameter in matrices.items():
                values, scale = quantised(parameter.data.transpose(1, 2))
                parameter.data = values.transpose(1, 2).contiguous()
                layer.register_buffer(f"{name}_scale", scale, persistent=False)
            layer.__class__ = Int8Experts


def is_quantised(network: nn.Module) -> bool:
    """Whether any layer has weights in int8."""
    return any(isinstance(module, Int8Linear | Int8Experts) for module in network.modules())
