"""The straight path from data to noise, and how a network's output is read as its velocity.

Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022 (arXiv 2209.03003). Everywhere in this package t = 0 is data and
t = 1 is noise,
    x_t = (1 - t) x_0 + (sigma_min + (1 - sigma_min) t) epsilon,    v = dx/dt = (1 - sigma_min) epsilon - x_0.
Other conventions of time and step size, of foreign networks, are converted here and nowhere else.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditune.errors import require
from ditune.processes.diffusion_as_flow import DiffusionAsFlow
from ditune.processes.gaussian import GaussianProcess

STEPS = ("none", "log2", "size")
BRIDGES = ("aligned", "path")


class FlowProcess:
    """The linear path, and how time and step size are fed to the network.

    Args:
        time_scale: the network's time is time_scale * t. 1000 suits DiT's embedding, which was made for 0..999; DiT-MoE
            and the shortcut code use 1.
        data_at: the network's own time of the data: 0, or 1 as in the shortcut code, whose velocity points to the data.
        sigma_min: standard deviation of the noise in the data; 1e-5 in the shortcut code.
        step: how the step size d is fed to the network: 'none', 'log2' (log2(1/d), the shortcut code's index) or 'size'
            (time_scale * d). The velocity is averaged over a step of this size.
        base_steps: M of shortcut models (arXiv 2410.12557), a power of 2: d is 1, 1/2, ... 1/M. The finest d means the
            instantaneous velocity: 'log2' feeds it as log2(M), like the code, and 'size' as 0, like the paper.
            None: any d in [0, 1].
        diffusion: config of the diffusion that the network was trained on. Its inputs and outputs are then converted,
            and time_scale and data_at are not used. None: the network was trained on a flow.
        straightened: the network holds two flows, selected by d: d = 1 is the reflowed (straightened) one, the finest d
            the original one; other d are unused (live reflow).
        bridge: how a diffusion is read as a flow by `on_diffusion`: 'aligned' asks the network at the timestep of equal
            signal-to-noise ratio, 'path' follows the diffusion's own path (`DiffusionPath`).
        step_blocks: last blocks of the network that are conditioned on d, the others on t alone; None = all. It is a
            property of the network, so the stored config of the process is without it.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    length = 1.0  # of the network's time, for parts of the process

    def __init__(
        self,
        time_scale: float = 1000.0,
        data_at: int = 0,
        sigma_min: float = 0.0,
        step: str = "none",
        base_steps: int | None = None,
        diffusion: dict | None = None,
        straightened: bool = False,
        bridge: str = "aligned",
        step_blocks: int | None = None,
    ):
        key = "objective.process"
        require(step in STEPS, f"{key}.step", step, f"Choose one of {', '.join(STEPS)}.")
        require(data_at in (0, 1), f"{key}.data_at", data_at, "Set it to 0 or 1.")
        require(time_scale > 0, f"{key}.time_scale", time_scale, "Set it above 0.")
        require(0 <= sigma_min < 1, f"{key}.sigma_min", sigma_min, "Set it to 0 or more and below 1.")
        power_of_2 = base_steps is None or (base_steps >= 2 and base_steps & (base_steps - 1) == 0)
        require(power_of_2, f"{key}.base_steps", base_steps, "Set it to a power of 2, like 128, or to null.")
        remedy = "step=log2 needs the finest step size: set objective.process.base_steps=128."
        require(step != "log2" or base_steps is not None, f"{key}.base_steps", base_steps, remedy)
        require(bridge in BRIDGES, f"{key}.bridge", bridge, f"Choose one of {', '.join(BRIDGES)}.")
        remedy = "Set it to 1 or more, or to null for all blocks."
        require(step_blocks is None or step_blocks >= 1, f"{key}.step_blocks", step_blocks, remedy)
        remedy = "No block is conditioned on a step size: set objective.process.step=size, or step_blocks=null."
        require(step_blocks is None or step != "none", f"{key}.step_blocks", step_blocks, remedy)
        self.bridge, self.step_blocks = bridge, step_blocks
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
        self.diffused = None if diffusion is None else DiffusionAsFlow(GaussianProcess(**diffusion))
        self.steps = 1

    def changed(self, **changes: object) -> "FlowProcess":
        """A copy with other values of some arguments."""
        arguments = self.config | {"bridge": self.bridge, "step_blocks": self.step_blocks} | changes
        return FlowProcess(**{key: value for key, value in arguments.items() if key != "kind"})

    def on_diffusion(self, diffusion: dict) -> "FlowProcess":
        """The same flow for a network that was trained on a diffusion.

        Args:
            diffusion: config of the diffusion.
        """
        if self.bridge == "path":
            from ditune.processes.diffusion_path import DiffusionPath  # which is a FlowProcess

            arguments = {key: value for key, value in self.config.items() if key not in ("kind", "diffusion")}
            return DiffusionPath(diffusion, step_blocks=self.step_blocks, **arguments)
        return self.changed(diffusion=diffusion)

    @property
    def network(self) -> dict[str, Any]:
        """Arguments that the process needs in its network's constructor."""
        if self.step == "none":
            return {}
        return {"step": True} | ({} if self.step_blocks is None else {"step_blocks": self.step_blocks})

    def in_steps(self, steps: int) -> "FlowProcess":
        """The same process for sampling in `steps` steps.

        Raises:
            UserError: fewer than one step.
        """
        require(steps >= 1, "steps", steps, "Set it to 1 or more.")
        process = copy.copy(self)
        process.steps = steps
        return process

    def times(self, shift: float = 1.0) -> Tensor:  # (steps + 1,) float64, from 1 to 0
        """Times of the steps' ends, evenly spaced before the shift, see `shifted`."""
        return shifted(1 - torch.arange(self.steps + 1, dtype=torch.float64) / self.steps, shift)

    def x_t(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # (N, C, H, W) x 2, (N,) -> (N, C, H, W)
        """Point of the straight path from x_0 to the noise at t in [0, 1]."""
        t = expanded(t, x0)
        return (1 - t) * x0 + (self.sigma_min + (1 - self.sigma_min) * t) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | None = None) -> Tensor:
        """Velocity dx/dt of the path from x_0 to the noise at t (N,), (N, C, H, W); of a straight path, at any t."""
        return (1 - self.sigma_min) * noise - x0

    def velocity(self, network: Callable, x: Tensor, t: Tensor, y: Tensor, d: Tensor | None = None) -> Tensor:
        """The network's velocity at x.

        Args:
            network: (x, network time, y) -> output, or (x, network time, y, network step) if it is step-conditioned.
            x: (N, C, H, W).
            t: (N,) in [0, 1].
            y: (N,) labels.
            d: (N,) step size in [0, t]: the velocity is the mean from t down to t - d. None: at t itself.

        Returns:
            (N, C, H, W). Output channels beyond the input's (a learned variance) are left out.
        """
        step: tuple[Tensor, ...] = (
            () if self.step == "none" else (self.network_step(torch.zeros_like(t) if d is None else d),)
        )
        if self.diffused is not None:
            x, timestep, alpha, sigma = self.diffused.to_diffusion_time(x, t)
            output = network(x, timestep, y, *step)[:, : x.shape[1]].to(x.dtype)
            return self.diffused.velocity(output, x, alpha, sigma)
        output = network(x, self.network_time(t), y, *step)[:, : x.shape[1]].to(x.dtype)
        return -output if self.data_at else output

    def bind(self, network: Callable) -> Callable[..., Tensor]:
        """`velocity` of one network: (x, t, y) or (x, t, y, d) -> (N, C, H, W)."""
        return lambda x, t, y, d=None: self.velocity(network, x, t, y, d)

    def network_time(self, t: Tensor) -> Tensor:  # (N,) -> (N,)
        """The network's own time of t in [0, 1]."""
        return self.time_scale * (1 - t if self.data_at else t)

    def part(self, time: Tensor) -> Tensor:  # (N,) -> (N,) in [0, 1]
        """Part of the process of the network's time, the inverse of `network_time`; of a diffusion, the diffusion's."""
        if self.diffused is not None:
            return self.diffused.process.part(time)
        return 1 - time / self.time_scale if self.data_at else time / self.time_scale

    def network_step(self, d: Tensor) -> Tensor:  # (N,) -> (N,)
        """What is fed to a step-conditioned network for the step size d in [0, 1]."""
        if self.step == "log2":
            return -d.clamp(min=1 / self.base_steps).log2()
        finest = 0 if self.base_steps is None else 1 / self.base_steps
        return self.time_scale * torch.where(d > finest, d, 0)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Time shift of SD3 (arXiv 2403.03206). Above 1, times move towards the noise; t = 0 and t = 1 stay.

    Args:
        t: times in [0, 1], of any shape.
        shift: above 0; 1 = none.
    """
    return shift * t / (1 + (shift - 1) * t)


def expanded(values: Tensor, like: Tensor) -> Tensor:  # (N,) -> (N, 1, 1, 1)
    """Values of samples, shaped to broadcast against `like` (N, ...), in its device and dtype."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
