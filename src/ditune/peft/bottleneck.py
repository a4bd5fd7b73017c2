"""Bottleneck adapters on the MLP of every block: parallel (AdaptFormer) or sequential (Houlsby et al.).

The DiffFit paper (arXiv 2304.06648) calls them Adapt-Parallel and Adapt-Sequential; bottleneck 64 gives its 4.28 M.
"""

import math

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.peft.base import PeftMethod, mlp_name, on_tokens


class Bottleneck(nn.Module):
    """s (W_up relu(W_down x + b_down) + b_up), which is zero initially because W_up and b_up are.

    Args:
        size: D.
        bottleneck: width between the two layers.
        scale: s.
        device: of the parameters, which are always fp32.
    """

    def __init__(self, size: int, bottleneck: int, scale: float, device: torch.device):
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(size, bottleneck, device=device, dtype=torch.float32)
        self.up = nn.Linear(bottleneck, size, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """Each token by itself."""
        return self.scale * self.up(self.down(x).relu())


class Parallel(nn.Module):
    """A module with an adapter beside it: MLP(x) + adapter(x).

    Args:
        base: the module.
        adapter: D to D.
    """

    def __init__(self, base: nn.Module, adapter: nn.Module):
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:  # (N, T, D) -> (N, T, D)
        """Further arguments go to the module."""
        return on_tokens(self.base(x, *args, **kwargs), lambda h: h + self.adapter(x))


class Sequential(Parallel):
    """A module with an adapter after it: h + adapter(h) with h = MLP(x)."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:  # (N, T, D) -> (N, T, D)
        """Further arguments go to the module."""
        return on_tokens(self.base(x, *args, **kwargs), lambda h: h + self.adapter(h))


class AdaptFormer(PeftMethod):
    """AdaptFormer (Chen et al., arXiv 2205.13535, eq. 3): a bottleneck parallel to the MLP, after the same LayerNorm.

    In DiT the adapter has the MLP's input, which is modulated, and its output is gated with the MLP's.

    Args:
        lr, weight_decay, train_labels: see `PeftMethod`.
        bottleneck: width between the two layers, at least 1.
        scale: s, factor on the adapter's output.

    Raises:
        UserError: `bottleneck` is below 1.
    """

    wrapper: type[Parallel] = Parallel
    path = (".adapter.up.",)
    unmergeable = "its adapters are not linear"

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        train_labels: bool = True,
        bottleneck: int = 64,
        scale: float = 0.1,
    ):
        super().__init__(lr, weight_decay, train_labels)
        if bottleneck < 1:
            raise UserError(f"peft.bottleneck is {bottleneck}. Set a width of at least 1.")
        self.bottleneck, self.scale = bottleneck, scale

    def selects(self, name: str) -> bool:
        """The adapters."""
        return ".adapter." in name

    def inject(self, network: nn.Module) -> None:
        """Wrap the second branch of every block."""
        for block in network.blocks:
            name, like = mlp_name(block), block.attn.proj.weight
            adapter = Bottleneck(like.shape[0], self.bottleneck, self.scale, like.device)
            setattr(block, name, self.wrapper(getattr(block, name), adapter))


class Adapter(AdaptFormer):
    """Adapter (Houlsby et al., arXiv 1902.00751) after the MLP of every block, with a residual connection."""

    wrapper = Sequential
