"""The straight path from data to noise, and the reading of a network's output as a velocity on it.

Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022 (arXiv 2209.03003). Everywhere in this package t = 0 is data and
t = 1 is noise,
    x_t = (1 - t) x_0 + (sigma_min + (1 - sigma_min) t) epsilon,    v = dx/dt = (1 - sigma_min) epsilon - x_0.
Networks of others that count time or step in another way are converted here and nowhere else.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.processes.diffusion_as_flow import Diffused
from ditune.processes.gaussian import GaussianProcess

STEPS = ("none", "log2", "size")


class FlowProcess:
    """The linear path, and how a network is told where on it a sample stands.

    Args:
        time_scale: the network is told time_scale * time. 1000 suits DiT's embedding, which was made for 0..999;
            1 is what DiT-MoE and the shortcut code feed.
        data_at: the network's own time has its data at 0 or, as the shortcut code, at 1; its velocity then points to
            the data.
        sigma_min: noise that is left in the data; 1e-5 in the shortcut code.
        step: how the network is told the length d of the step that its velocity is averaged over. 'none': it is not,
            'log2': log2(1/d), the shortcut code's index, 'size': time_scale * d.
        base_steps: M of shortcut models (arXiv 2410.12557), a power of 2: d is 1, 1/2, ... 1/M, and the finest one
            stands for the velocity itself, d = 0: 'log2' tells it as log2(M), as the code does, 'size' as 0, as the
            paper's d. None: any d in [0, 1].
        diffusion: config of the diffusion that the network was trained on, and in whose terms it is asked; then
            time_scale and data_at are not used. None: it is asked in the flow's.
        straightened: d = 1 tells the network to follow a second, straightened flow, and between it and the finest step
            there is nothing (live reflow).

    Raises:
        UserError: unknown names, or numbers out of range.
    """

    length = 1.0  # of its time, for parts of the process

    def __init__(
        self,
        time_scale: float = 1000.0,
        data_at: int = 0,
        sigma_min: float = 0.0,
        step: str = "none",
        base_steps: int | None = None,
        diffusion: dict | None = None,
        straightened: bool = False,
    ):
        if step not in STEPS:
            raise UserError(f"The process knows no step {step!r}. Choose one of {', '.join(STEPS)}.")
        if data_at not in (0, 1) or time_scale <= 0 or not 0 <= sigma_min < 1:
            raise UserError("There is no such flow. Set data_at to 0 or 1, time_scale above 0, sigma_min in [0, 1).")
        if base_steps is not None and (base_steps < 2 or base_steps & (base_steps - 1)):
            raise UserError(f"base_steps is {base_steps}, which no halving reaches. Set it to a power of 2, like 128.")
        if step == "log2" and base_steps is None:
            raise UserError("step=log2 needs the number of the finest steps. Set objective.process.base_steps=128.")
        self.config = {
            "kind": "flow",
            "time_scale": time_scale,
            "data_at": data_at,
            "sigma_min": sigma_min,
            "step": step,
            "base_steps": base_steps,
            "diffusion": diffusion,
            "straightened": straightened,
        }
        self.time_scale, self.data_at, self.sigma_min = time_scale, data_at, sigma_min
        self.step, self.base_steps, self.straightened = step, base_steps, straightened
        self.diffused = None if diffusion is None else Diffused(GaussianProcess(**diffusion))
        self.steps = 1

    def changed(self, **changes: object) -> "FlowProcess":
        """The same process but for some arguments."""
        return FlowProcess(**{key: value for key, value in (self.config | changes).items() if key != "kind"})

    def on_diffusion(self, diffusion: dict) -> "FlowProcess":
        """The same flow by a network that was trained on a diffusion."""
        return self.changed(diffusion=diffusion)

    @property
    def network(self) -> dict[str, bool]:
        """What the process asks of its network's constructor."""
        return {"step": True} if self.step != "none" else {}

    def in_steps(self, steps: int) -> "FlowProcess":
        """The same process, to be drawn in `steps` steps.

        Raises:
            UserError: fewer than one.
        """
        if steps < 1:
            raise UserError(f"A flow cannot be drawn in {steps} steps. Set steps to 1 or more.")
        process = copy.copy(self)
        process.steps = steps
        return process

    def times(self, shift: float = 1.0) -> Tensor:  # (steps + 1,) float64, from 1 to 0
        """Ends of the steps, evenly spaced before the shift."""
        return shifted(1 - torch.arange(self.steps + 1, dtype=torch.float64) / self.steps, shift)

    def x_t(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # (N, C, H, W) x 2, (N,) -> (N, C, H, W)
        t = expanded(t, x0)
        return (1 - t) * x0 + (self.sigma_min + (1 - self.sigma_min) * t) * noise

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """dx/dt of the straight path from x_0 to the noise."""
        return (1 - self.sigma_min) * noise - x0

    def velocity(self, network: Callable, x: Tensor, t: Tensor, y: Tensor, d: Tensor | None = None) -> Tensor:
        """The network's velocity at x, (N, C, H, W); channels beyond the input's (a variance) are not part of it.

        Args:
            network: (x, network time, y) -> output, or (x, network time, y, network step) where it is told steps.
            x: (N, C, H, W).
            t: (N,) in [0, 1].
            y: (N,) labels.
            d: (N,) in [0, t]: the velocity is the mean one from t down to t - d. None: at t itself.
        """
        step: tuple[Tensor, ...] = (
            () if self.step == "none" else (self.network_step(torch.zeros_like(t) if d is None else d),)
        )
        if self.diffused is not None:
            x, timestep, alpha, sigma = self.diffused.question(x, t)
            output = network(x, timestep, y, *step)[:, : x.shape[1]].to(x.dtype)
            return self.diffused.velocity(output, x, alpha, sigma)
        output = network(x, self.network_time(t), y, *step)[:, : x.shape[1]].to(x.dtype)
        return -output if self.data_at else output

    def bind(self, network: Callable) -> Callable[..., Tensor]:
        """`velocity` of one network."""
        return lambda x, t, y, d=None: self.velocity(network, x, t, y, d)

    def network_time(self, t: Tensor) -> Tensor:  # (N,) -> (N,)
        return self.time_scale * (1 - t if self.data_at else t)

    def network_step(self, d: Tensor) -> Tensor:  # (N,) -> (N,)
        if self.step == "log2":
            return -d.clamp(min=1 / self.base_steps).log2()
        finest = 0 if self.base_steps is None else 1 / self.base_steps
        return self.time_scale * torch.where(d > finest, d, 0)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Time shift of arXiv 2403.03206 (SD3): above 1 the times move to the noise; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def expanded(values: Tensor, like: Tensor) -> Tensor:  # (N,) -> (N, 1, 1, 1)
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
