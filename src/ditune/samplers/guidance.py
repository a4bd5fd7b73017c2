"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): the one place of its formula.

The paper's eq. 6 is (1 + w) conditional - w unconditional. Everywhere in this package the scale is s = w + 1, so that
1 is no guidance.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

# x (N, C, H, W), time (N,) and for step-conditioned networks the step size (N,) -> output (N, C or 2C, H, W)
ModelFn = Callable[..., Tensor]


def guide(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    *,
    where: Tensor | None = None,
    form: Literal["from_conditional", "from_unconditional", "mixture"] = "from_conditional",
) -> Tensor:
    """Push a prediction away from the unconditional one (arXiv 2207.12598, eq. 6).

    Args:
        conditional: (N, C, H, W) prediction with the class.
        unconditional: (N, C, H, W) prediction with the null class.
        scale: guidance scale s; 1 is no guidance.
        where: (N,) bool, the samples that are guided; None = all. The others keep `conditional` to the bit, which only
            'from_conditional' can promise.
        form: how the formula is written. The three forms are equal but for their rounding, and stored results depend
            on it. 'from_conditional' is used by samplers, 'from_unconditional' by targets of two steps (as the code of
            arXiv 2410.12557), 'mixture' by MeanFlow's guided velocity (arXiv 2505.13447, section 4.2).

    Returns:
        (N, C, H, W).
    """
    if form == "mixture":
        return scale * conditional + (1 - scale) * unconditional
    difference = conditional - unconditional
    if form == "from_unconditional":
        return unconditional + scale * difference
    if where is None:
        return conditional + (scale - 1.0) * difference
    return conditional + torch.where(where, scale - 1.0, 0.0).to(difference.dtype).view(-1, 1, 1, 1) * difference


def at_time(model_fn: ModelFn, time: float) -> ModelFn:
    """The model at a time that all samples share.

    A `guided` one decides by it whether to guide, and need not wait for the device that has the times.

    Args:
        model_fn: see `ModelFn`.
        time: the number that fills its times.
    """
    return partial(model_fn, shared_time=time) if getattr(model_fn, "knows_shared_time", False) else model_fn


def guided(
    network: Callable[..., Tensor],
    y: Tensor,
    null_class: int,
    scale: float,
    interval: Sequence[float] = (0.0, 1.0),
    channels: int | None = None,
    timesteps: float = 1000,
    rescale: float = 0.0,
    weaker: ModelFn | None = None,
) -> ModelFn:
    """Bind a network to labels, with guidance away from the null class or from a weaker network.

    Args:
        network: (x, t, y) -> output; (x, t, y, step) -> output for step-conditioned networks.
        y: (N,) labels.
        null_class: label of the null class.
        scale: guidance scale s. At 1 the network runs once per call, else twice.
        interval: part of the process in which guidance is on, 0 = data and 1 = noise (arXiv 2404.07724). Outside of it
            the network runs once.
        channels: number of leading channels that are guided; None = all predicted ones, facebookresearch/DiT guides 3.
            The other channels, and a learned variance, stay conditional.
        timesteps: length of the network's time, which turns t into a part of the process.
        rescale: phi of arXiv 2305.08891, section 3.4, in [0, 1]: how far the guided output is scaled back to the
            standard deviation of the conditional one.
        weaker: gives the unconditional prediction in a call of its own, see `guides`; None = the network's null class,
            in one call of 2N.

    Returns:
        (x, t) -> output, or (x, t, step) -> output; see `at_time` too.
    """
    low, high = interval
    everywhere = low <= 0 and high >= 1
    both_labels = torch.cat([y, torch.full_like(y, null_class)])  # (2N,)

    def is_inside(t: Tensor) -> Tensor:  # (N,) -> (N,)
        return (low * timesteps <= t) & (t <= high * timesteps)

    def branches(x: Tensor, t: Tensor, *step: Tensor) -> Sequence[Tensor]:
        if weaker is not None:
            return network(x, t, y, *step), weaker(x, t, *step)
        doubled = (torch.cat([value, value]) for value in step)
        both = network(torch.cat([x, x]), torch.cat([t, t]), both_labels, *doubled)  # (2N, C or 2C, H, W)
        return both.chunk(2)

    def model_fn(x: Tensor, t: Tensor, *step: Tensor, shared_time: float | None = None) -> Tensor:
        inside = is_inside(t)
        known = inside
        if shared_time is not None:
            known = is_inside(torch.full((1,), shared_time, dtype=t.dtype))  # on the CPU, likewise rounded
        if scale == 1 or not (everywhere or known.any()):
            return network(x, t, y, *step)
        conditional, unconditional = branches(x, t, *step)
        count = x.shape[1] if channels is None else channels
        pushed = guide(conditional[:, :count], unconditional[:, :count], scale, where=inside)
        if rescale > 0:  # arXiv 2305.08891, section 3.4
            spread, wanted = (v.std(dim=(1, 2, 3), keepdim=True) for v in (pushed, conditional[:, :count]))
            pushed = pushed * (1 + rescale * (wanted / spread - 1))
        return torch.cat([pushed, conditional[:, count:]], dim=1)

    model_fn.knows_shared_time = True
    return model_fn
