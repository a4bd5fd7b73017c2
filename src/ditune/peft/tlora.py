"""T-LoRA (Soboleva et al., arXiv 2507.05964): LoRA whose rank depends on the time of each sample.

Near the noise few ranks act, near the data all: noisy samples are those that a small dataset is memorised at. This is
the paper's vanilla form, without its orthogonal initial values. N batch, T tokens, D hidden size, r rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.networks.embeddings import TimestepEmbedder
from ditune.peft.base import PeftMethod
from ditune.peft.huggingface import ADAPTER, HuggingFace, layers
from ditune.peft.huggingface_rows import QKV

DIT_TIMES = (0.0, 1000.0)  # network times of data and noise where no process says otherwise


class Ranks:
    """Which ranks act on each sample of the call of the network that is running.

    Args:
        r: all ranks, which act on data.
        min_r: those that act on noise.
        power: of the part of the way from noise to data.
        times: the network's times of data and of noise.
    """

    def __init__(self, r: int, min_r: int, power: float, times: tuple[float, float]):
        self.r, self.min_r, self.power, self.times = r, min_r, power, times
        self.mask: Tensor | None = None  # (N, r) bool

    def set(self, t: Tensor) -> None:
        """Begin a call with network times t (N,): r(t) = floor((1 - s)^power (r - min_r)) + min_r.

        s is the part of the way from data to noise, t / T of a diffusion of T steps.
        """
        data, noise = self.times
        part = ((t.float() - data) / (noise - data)).clamp(0, 1)
        ranks = ((1 - part) ** self.power * (self.r - self.min_r) + 1e-4).floor() + self.min_r  # of exact products too
        self.mask = torch.arange(self.r, device=t.device) < ranks[:, None]

    def recompute_context(self) -> tuple[Any, Any]:
        """Contexts of a block and of its second computation, which may come after another call of the network."""
        return nullcontext(), self._again(self.mask)

    @contextmanager
    def _again(self, mask: Tensor | None) -> Iterator[None]:
        now, self.mask = self.mask, mask
        try:
            yield
        finally:
            self.mask = now


class Timed(TimestepEmbedder):
    """The network's embedding of the time, which sets the ranks. Its parameters keep their names.

    Args:
        base: the embedder.
        ranks: of the method.
    """

    def __init__(self, base: TimestepEmbedder, ranks: Ranks):
        nn.Module.__init__(self)
        self.frequency_size, self.mlp, self.ranks = base.frequency_size, base.mlp, ranks
        self.register_buffer("frequencies", base.frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:  # (N,) -> (N, D)
        """Embed timesteps. A missing time arrives as 0."""
        self.ranks.set(t)
        return super().forward(t)


class Masked(nn.Module):
    """LoRA's A, followed by the mask of the ranks.

    Args:
        base: the linear layer A.
        ranks: of the method.
    """

    def __init__(self, base: nn.Linear, ranks: Ranks):
        super().__init__()
        self.weight, self.ranks = base.weight, ranks

    def forward(self, x: Tensor) -> Tensor:  # (N, ..., D) -> (N, ..., r)
        """Zero where a rank does not act on a sample.

        Raises:
            UserError: the layer does not get one row a sample, as layers inside of experts.
        """
        low, mask = nn.functional.linear(x, self.weight), self.ranks.mask
        if len(low) != len(mask):
            raise UserError(
                f"peft.target_modules names a layer with input {tuple(x.shape)}, where the batch is {len(mask)}: the "
                r"samples' times are not known there. Name other layers, as blocks\.\d+\.attn\.qkv."
            )
        return low * mask.view(len(mask), *[1] * (low.ndim - 2), -1).to(low.dtype)


class TLora(HuggingFace):
    """LoRA with min_r ranks on noise, up to r ranks on data.

    Args:
        lr, weight_decay, train_labels: see `PeftMethod`.
        r: ranks that act on data, at least 1.
        lora_alpha: the change of a weight is lora_alpha / r times B M_t A, M_t the mask of the ranks.
        min_r: ranks that act on noise, in 0..r.
        power: 1 = the number of ranks is linear in time; above 1, fewer ranks act in between.
        times: the network's times of data and of noise; None = those of the process, or DiT's 0 and 1000.
        target_modules: linear layers, by regex or as a list of endings; each gets one row or more of every sample.

    Raises:
        UserError: a value is out of range.
    """

    unmergeable = "its change of the weights depends on the time"

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        train_labels: bool = True,
        r: int = 8,
        lora_alpha: float = 8,
        min_r: int = 1,
        power: float = 1.0,
        times: list[float] | None = None,
        target_modules: str | list[str] = QKV,
    ):
        super().__init__(
            "LORA", lr, weight_decay, train_labels, r=r, lora_alpha=lora_alpha, target_modules=target_modules
        )
        if not 0 <= min_r <= r:
            raise UserError(f"peft.min_r is {min_r}. Set it between 0 and peft.r={r}.")
        if times is not None and (len(times) != 2 or times[0] == times[1]):
            raise UserError(f"peft.times is {times}. Give the network's times of data and of noise, as [0, 1000].")
        self.ranks = Ranks(r, min_r, power, tuple(times or DIT_TIMES))
        self.given = times is not None
        self.sums = None  # a rank acts by its position

    def bind(self, part: Callable[[Tensor], Tensor]) -> None:
        """Take the network's times from the process, unless they are given; they are stored in the adapter."""
        if self.given:
            return
        first, second = part(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()  # the part is linear in time
        data, noise = -first / (second - first), (1 - first) / (second - first)
        self.ranks.times = (round(data, 6), round(noise, 6))
        self.arguments = self.arguments | {"times": list(self.ranks.times)}

    def inject(self, network: nn.Module) -> None:
        """Put LoRA into the network, masks into LoRA, and the embedding of the time before them."""
        super().inject(network)
        for layer in layers(network).values():
            layer.lora_A[ADAPTER] = Masked(layer.lora_A[ADAPTER], self.ranks)
        network.t_embedder = Timed(network.t_embedder, self.ranks)
        network.recompute_context = self.ranks.recompute_context

    def to_file(self, network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """In the format of our own methods: peft would read a plain LoRA."""
        return PeftMethod.to_file(self, network)

    def from_file(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of `to_file`."""
        PeftMethod.from_file(self, network, tensors)
