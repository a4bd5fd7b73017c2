"""A critic of predicted images beside consistency training (ACT-Diffusion, Kong et al. 2023, arXiv 2311.14097).

    L = (1 - w) L_consistency + w L_G,    L_G = softplus(-D(f(x_t, t), t))
    L_D = softplus(D(f(x_t, t), t)) + softplus(-D(x_0, t)) + R1,    R1 = gamma/2 |grad_x D(x_0, t)|^2

with the end f(x_t, t) of the path that the network predicts at t. Ours: the critic D is a small transformer on latents.
One backward pass gives both gradients, G's through a critic that is held fixed and D's on fixed images, so both move in
one step; the authors alternate. All images of a batch serve both; theirs are shared out. There is no augmentation of
what the critic sees.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from ditune.errors import UserError, require

HEAD = 32  # channels of a head of the critic's attention


class Losses(NamedTuple):
    """Losses of both sides, (N,) each."""

    generator: Tensor  # L_G, with gradient to the network alone
    critic: Tensor  # L_D, with gradient to the critic alone


class CriticNetwork(nn.Module):
    """D(x, t): patches and their places, the time added to each, blocks of attention, a linear layer on their mean.

    Its parts are torch's own, whose gradient has a gradient, as R1 needs it. It begins with D = 0.

    Args:
        channels, size, patch: C, side of the latents, and side of a patch.
        width: D, channels of a token.
        depth: number of blocks.
    """

    def __init__(self, channels: int, size: int, patch: int, width: int, depth: int):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // HEAD, 4 * width, **options) for _ in range(depth)
        )
        self.norm, self.score = nn.LayerNorm(width), nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # (N, C, H, W), (N,) in [0, 1] -> (N,)
        """Above 0 for what looks real."""
        angles = 1000 * t[:, None].float() * self.frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places + time[:, None]  # (N, T, D)
        for block in self.blocks:
            tokens = block(tokens)
        return self.score(self.norm(tokens).mean(dim=1))[:, 0]


class Critic(nn.Module):
    """D, and its share in the loss. Its `network` is set when the latents are known, see `build`.

    Args:
        weight: w in (0, 1], or the largest w where `mid` is set. 0.3 in the authors' CIFAR-10 training.
        mid: w in the middle of the path, below `weight`: w(t) = weight t^p with w(1/2) = mid, 0 at the data. 0.2 with a
            weight of 0.6 in the authors' ImageNet training; None = w is the same at all times.
        r1: gamma of R1; 0 = none.
        every: steps from one R1 to the next.
        lr: learning rate of the critic, which follows the scheduler as that of the network does.
        width: channels of the critic, a multiple of 32.
        depth: blocks of the critic.

    Raises:
        UserError: a number is out of range.
    """

    betas = (0.0, 0.99)  # of its AdamW, the authors'

    def __init__(
        self,
        weight: float = 0.3,
        mid: float | None = None,
        r1: float = 10.0,
        every: int = 16,
        lr: float = 1e-4,
        width: int = 64,
        depth: int = 2,
    ):
        super().__init__()
        key = "objective.critic"
        require(0 < weight <= 1, f"{key}.weight", weight, f"Set it above 0 and up to 1, or {key}=null.")
        between = mid is None or 0 < mid < weight
        require(between, f"{key}.mid", mid, f"Set it above 0 and below {key}.weight={weight}, or to null.")
        require(r1 >= 0, f"{key}.r1", r1, "Set it to 0 or more.")
        require(every >= 1, f"{key}.every", every, "Set it to 1 or more.")
        require(lr > 0, f"{key}.lr", lr, "Set it above 0.")
        require(width > 0 and width % HEAD == 0, f"{key}.width", width, f"Set a multiple of {HEAD}.")
        require(depth >= 1, f"{key}.depth", depth, "Set it to 1 or more.")
        self.weight, self.r1, self.every, self.lr, self.width, self.depth = weight, r1, every, lr, width, depth
        self.power = 0.0 if mid is None else math.log(mid / weight, 0.5)
        self.network: nn.Module | None = None

    def build(self, config: Mapping[str, Any]) -> None:
        """Make D for the latents of a network with this config."""
        shape = (config["in_channels"], config["input_size"], config["patch_size"])
        self.network = CriticNetwork(*shape, self.width, self.depth)

    def weights(self, t: Tensor) -> Tensor:  # (N,) -> (N,)
        """w(t) at times in [0, 1], 0 = data."""
        return self.weight * t**self.power if self.power else torch.full_like(t, self.weight)

    def losses(self, real: Tensor, fake: Tensor, time: Tensor, step: int) -> Losses:
        """The losses of both sides.

        Args:
            real: (N, C, H, W) data.
            fake: (N, C, H, W) predictions of it, with gradient.
            time: (N,) of the predictions, in [0, 1], 0 = data.
            step: optimizer step, from 0, which decides whether there is an R1.
        """
        fixed = {name: value.detach() for name, value in self.network.named_parameters()}
        generator = softplus(-self.score(fake, time, fixed))
        with_r1 = self.r1 > 0 and step % self.every == 0
        real = real.detach().requires_grad_(with_r1)
        if with_r1:
            with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
                on_real = self.score(real, time)
                (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            penalty = self.r1 / 2 * slope.square().sum(dim=(1, 2, 3))
        else:
            on_real, penalty = self.score(real, time), 0.0
        return Losses(generator, softplus(self.score(fake.detach(), time)) + softplus(-on_real) + penalty)

    def score(self, x: Tensor, t: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:  # (N,)
        """D(x, t) in fp32; with other values of its parameters, if they are given."""
        score = self.network(x, t) if values is None else functional_call(self.network, dict(values), (x, t))
        return score.float()

    def group(self) -> dict[str, Any]:
        """Its parameters as a group of the optimizer."""
        named = [(f"critic.{name}", parameter) for name, parameter in self.network.named_parameters()]
        return {"params": named, "lr": self.lr, "betas": self.betas, "weight_decay": 0.0}


def critic_of(settings: Mapping[str, Any] | None) -> Critic | None:
    """The critic of `objective.critic`; None = there is none, as with a weight of 0.

    Raises:
        UserError: an unknown key, or a number is out of range.
    """
    if settings is None or settings.get("weight") == 0:
        return None
    try:
        return Critic(**settings)
    except TypeError as error:
        raise UserError(
            f"objective.critic takes weight, mid, r1, every, lr, width and depth, as {{weight: 0.3}}: {error}."
        ) from None
