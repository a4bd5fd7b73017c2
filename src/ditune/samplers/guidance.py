"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# x (N, C, H, W), time (N,) and for networks that are told steps their length (N,) -> output (N, C or 2C, H, W)
ModelFn = Callable[..., Tensor]


def guided(
    network: Callable[..., Tensor],
    y: Tensor,
    null_class: int,
    scale: float,
    interval: Sequence[float] = (0.0, 1.0),
    channels: int | None = None,
    timesteps: float = 1000,
    rescale: float = 0.0,
) -> ModelFn:
    """A network bound to labels, its prediction pushed away from the unconditional one.

    Args:
        network: (x, t, y) -> output, and (x, t, y, step) where the sampler gives steps.
        y: (N,) labels.
        null_class: label that means no class.
        scale: guidance scale s: unconditional + s (conditional - unconditional). At 1 the network runs once.
        interval: part of the process, 0 = data and 1 = noise, in which guidance is on (arXiv 2404.07724); outside of it
            the network runs once.
        channels: number of leading channels that are guided, None for all predicted ones; facebookresearch/DiT guides
            3. The others, and a learned variance, are the conditional ones.
        timesteps: length of the time, by which t becomes a part of the process.
        rescale: phi of arXiv 2305.08891, section 3.4: the guided output is scaled towards the conditional one's
            standard deviation, wholly at 1.
    """
    low, high = interval
    everywhere = low <= 0 and high >= 1
    both_labels = torch.cat([y, torch.full_like(y, null_class)])  # (2N,)

    def model_fn(x: Tensor, t: Tensor, *step: Tensor) -> Tensor:
        inside = (low * timesteps <= t) & (t <= high * timesteps)  # (N,)
        if scale == 1 or not (everywhere or inside.any()):
            return network(x, t, y, *step)
        doubled = (torch.cat([value, value]) for value in step)
        both = network(torch.cat([x, x]), torch.cat([t, t]), both_labels, *doubled)
        conditional, unconditional = both.chunk(2)
        guided_channels = x.shape[1] if channels is None else channels
        difference = (conditional - unconditional)[:, :guided_channels]
        extra = torch.where(inside, scale - 1.0, 0.0).to(difference.dtype).view(-1, 1, 1, 1)
        # eq. 6 with w = s - 1: conditional + (s - 1) (conditional - unconditional), exact where guidance is off
        pushed = conditional[:, :guided_channels] + extra * difference
        if rescale > 0:
            spread, wanted = (v.std(dim=(1, 2, 3), keepdim=True) for v in (pushed, conditional[:, :guided_channels]))
            pushed = pushed * (1 + rescale * (wanted / spread - 1))
        return torch.cat([pushed, conditional[:, guided_channels:]], dim=1)

    return model_fn
