"""Fixed noise added to weights, with trained scales: after FLOAT (Kundu et al. 2022, arXiv 2204.00426).

FLOAT trains classifiers that are clean or robust, as a dial says: noise of a configurable scale is added to their
weight tensors, in place of layers that are conditioned on the dial. Here the dial is `ditune.peft.dial`, every method
has it, and the base stands at 0. What is ours: noise from a seed in place of new noise in each step, so that images
are repeatable and the change can be merged; and rows of a weight with scales of their own.
"""

import re
from zlib import crc32

import torch
from torch import Tensor, nn

from ditune.errors import UserError, require
from ditune.peft.base import PeftMethod
from ditune.rng import generator

GRANULARITIES = ("layer", "row")
MATRICES = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"


class NoisyLinear(nn.Linear):
    """A linear layer with the weight W + alpha eta; its own parameters keep their names.

    Args:
        base: the layer.
        eta: (out, in) fixed noise.
        rows: of alpha: 1, or as many as W has.
    """

    def __init__(self, base: nn.Linear, eta: Tensor, rows: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.alpha = nn.Parameter(torch.zeros(rows, 1, device=base.weight.device))
        self.register_buffer("eta", eta, persistent=False)

    @property
    def changed(self) -> Tensor:
        """W + alpha eta, (out, in) in fp32."""
        return self.weight + self.alpha * self.eta

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """As of a linear layer."""
        return nn.functional.linear(x, self.changed, self.bias)


class Float(PeftMethod):
    """W + alpha eta with eta ~ N(0, std(W)^2) from a seed and alpha trained, 0 in the beginning.

    Args:
        lr, weight_decay, train_labels: see `PeftMethod`.
        granularity: alpha is one number for each 'layer', or for each 'row' of a weight.
        noise_seed: of eta.
        target_modules: regular expression of the linear layers' names.

    Raises:
        UserError: an unknown granularity.
    """

    whole_weights = True  # W and the noise are added before they are multiplied by
    path = (".alpha.",)
    sums = "parameters"  # of equal noise

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        train_labels: bool = True,
        granularity: str = "layer",
        noise_seed: int = 0,
        target_modules: str = MATRICES,
    ):
        super().__init__(lr, weight_decay, train_labels)
        require(granularity in GRANULARITIES, "peft.granularity", granularity, "Choose layer or row.")
        self.granularity, self.noise_seed, self.target_modules = granularity, noise_seed, target_modules

    def selects(self, name: str) -> bool:
        """The scales."""
        return name.endswith(".alpha")

    @torch.no_grad()
    def inject(self, network: nn.Module) -> None:
        """Put noisy layers in place of those that `target_modules` names.

        Raises:
            UserError: none is, or one is no linear layer.
        """
        found = [name for name, _ in network.named_modules() if re.fullmatch(self.target_modules, name)]
        odd = [name for name in found if type(network.get_submodule(name)) is not nn.Linear]
        if odd or not found:
            raise UserError(
                f"peft.target_modules is {self.target_modules}, which names "
                f"{f'{odd[0]}, no linear layer' if odd else 'no layer of this network'}. Set it to a regular "
                f"expression of linear layers, such as {MATRICES}."
            )
        for name in found:
            parent, _, child = name.rpartition(".")
            base = network.get_submodule(name)
            rows = base.out_features if self.granularity == "row" else 1
            setattr(network.get_submodule(parent), child, NoisyLinear(base, self.noise(name, base.weight), rows))

    def noise(self, name: str, weight: Tensor) -> Tensor:
        """eta of a layer, in fp32: a function of the seed, its name and the spread of its weight."""
        if weight.is_meta:
            return torch.empty_like(weight, dtype=torch.float32)
        eta = torch.randn(weight.shape, generator=generator(self.noise_seed, crc32(name.encode())))
        return eta.to(weight.device) * weight.float().std()

    def fold(self, network: nn.Module) -> None:
        """Add the noise to the weights."""
        for name, layer in list(network.named_modules()):
            if isinstance(layer, NoisyLinear):
                parent, _, child = name.rpartition(".")
                layer.weight.copy_(layer.changed)
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                plain.weight, plain.bias = layer.weight, layer.bias
                setattr(network.get_submodule(parent), child, plain)
