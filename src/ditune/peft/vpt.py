"""Visual prompt tuning (Jia et al., arXiv 2203.12119): trained tokens that the patches attend to.

The adapted network does not start as the base: even prompts of zeros get a share of the attention.
"""

import math

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.peft.base import PeftMethod, on_tokens


class Prompted(nn.Module):
    """A block with P prompts before its tokens; it returns the tokens without them.

    Args:
        base: the block.
        prompts: (P, D).
    """

    off = False  # set while the base alone computes

    def __init__(self, base: nn.Module, prompts: nn.Parameter):
        super().__init__()
        self.base, self.prompts = base, prompts  # prompts (P, D)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:  # (N, T, D) -> (N, T, D)
        """Further arguments go to the block."""
        if self.off:
            return self.base(x, *args, **kwargs)
        prompts = self.prompts.to(x.dtype).expand(len(x), -1, -1)
        output = self.base(torch.cat([prompts, x], dim=1), *args, **kwargs)
        return on_tokens(output, lambda tokens: tokens[:, len(self.prompts) :])


class Prepend(Prompted):
    """`Prompted` that keeps the prompts before the tokens, for the following blocks."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:  # (N, T, D) -> (N, P + T, D)
        """Further arguments go to the block."""
        if self.off:
            return self.base(x, *args, **kwargs)
        prompts = self.prompts.to(x.dtype).expand(len(x), -1, -1)
        return self.base(torch.cat([prompts, x], dim=1), *args, **kwargs)


class Strip(nn.Module):
    """The last block after a `Prepend`: it removes the prompts from its output.

    Args:
        base: the block.
        prompts: P.
    """

    off = False  # see `Prompted`

    def __init__(self, base: nn.Module, prompts: int):
        super().__init__()
        self.base, self.prompts = base, prompts

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:  # (N, P + T, D) -> (N, T, D)
        """Further arguments go to the block."""
        if self.off:
            return self.base(x, *args, **kwargs)
        return on_tokens(self.base(x, *args, **kwargs), lambda tokens: tokens[:, self.prompts :])


class VPT(PeftMethod):
    """New prompts in every block (deep, eq. 5), or in the first block and carried to the last (shallow, eq. 4).

    Args:
        lr, weight_decay, train_labels: see `PeftMethod`.
        num_prompts: P, prompts of a block, at least 1.
        deep: every block has its own prompts.

    Raises:
        UserError: `num_prompts` is below 1.
    """

    starts_as_identity = False
    unmergeable = "its prompts are tokens, not weights"

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        train_labels: bool = True,
        num_prompts: int = 10,
        deep: bool = True,
    ):
        super().__init__(lr, weight_decay, train_labels)
        if num_prompts < 1:
            raise UserError(f"peft.num_prompts is {num_prompts}. Set at least 1.")
        self.num_prompts, self.deep = num_prompts, deep

    def selects(self, name: str) -> bool:
        """The prompts."""
        return name.endswith(".prompts")

    def inject(self, network: nn.Module) -> None:
        """Wrap all blocks (deep), or the first and the last one (shallow)."""
        blocks = network.blocks
        if self.deep:
            for i, block in enumerate(blocks):
                blocks[i] = Prompted(block, self._prompts(network))
        elif len(blocks) == 1:
            blocks[0] = Prompted(blocks[0], self._prompts(network))
        else:
            blocks[0], blocks[-1] = Prepend(blocks[0], self._prompts(network)), Strip(blocks[-1], self.num_prompts)

    def _prompts(self, network: nn.Module) -> nn.Parameter:
        """Uniform in Xavier's bounds for a patch of 3 channels, as in the paper's code."""
        like = network.x_embedder.proj.weight  # (D, C, patch, patch)
        bound = math.sqrt(6 / (3 * like.shape[-1] * like.shape[-2] + like.shape[0]))
        prompts = torch.empty(self.num_prompts, like.shape[0], device=like.device, dtype=torch.float32)
        return nn.Parameter(prompts.uniform_(-bound, bound))
