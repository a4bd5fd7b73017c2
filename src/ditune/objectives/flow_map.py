"""What MeanFlow, alpha-Flow and SoFlow share: mean velocities over steps of any size, learned without a teacher.

u(x_t, t, d) is the mean velocity from t down to r = t - d. Some samples learn it for d > 0, the others flow matching.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, State, drop_labels
from ditune.objectives.flow_base import FlowObjective, Targets, called_rows, logit_normal, with_scale
from ditune.processes import FlowProcess, expanded
from ditune.rng import StepRandom
from ditune.samplers.guidance import guide


class FlowMap(FlowObjective):
    """The error of the mean velocity over a step. A subclass gives its target by `mean_velocity`.

    Args:
        process: the flow; its network is conditioned on any step size (no `base_steps`).
        share: share of samples that learn a step of d > 0, in [0, 1].
        mean, std: both ends of a step are sigmoid(mean + std z); the later one is t.
        guidance: classifier-free guidance of the learned velocity, so that sampling needs none; 1 = none.
        power, eps: a sample of error e has the weight (e + eps)^-power (arXiv 2505.13447, section 4.3); power 0 = not.
        label_drop: share of labels that are replaced by the null class.

    Raises:
        UserError: a number out of range, or a process that does not give its network every step size.
    """

    def __init__(
        self,
        process: FlowProcess,
        share: float = 0.25,
        mean: float = -0.4,
        std: float = 1.0,
        guidance: float = 1.0,
        power: float = 1.0,
        eps: float = 1e-3,
        label_drop: float = 0.1,
    ):
        super().__init__(process, label_drop)
        remedy = "Flow maps are conditioned on any step size: set objective.process.step=size and base_steps=null."
        require(process.step == "size", "objective.process.step", process.step, remedy)
        remedy = "Flow maps have no finest step size: set objective.process.base_steps=null."
        require(process.base_steps is None, "objective.process.base_steps", process.base_steps, remedy)
        require(0 <= share <= 1, "objective.share", share, "Set it between 0 and 1.")
        require(std > 0, "objective.std", std, "Set it above 0.")
        require(power >= 0, "objective.power", power, "Set it to 0 or more.")
        require(eps > 0, "objective.eps", eps, "Set it above 0.")
        self.share, self.mean, self.std = share, mean, std
        self.guidance, self.power, self.eps = guidance, power, eps

    def scale(self, state: State) -> float:
        """alpha in (0, 1], the part of the step in the target's first part; the error is divided by it."""
        return 1.0

    @abstractmethod
    def mean_velocity(
        self, network: Callable, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, state: State
    ) -> Tensor:
        """The target of u(x_t, t, d) for d > 0.

        Args:
            network: the network in training, with the guidance scales of these samples where it is given them.
            x_t: (N, C, H, W) point at t.
            v: (N, C, H, W) velocity of the path at x_t.
            t: (N,) time of x_t.
            d: (N,) step size in (0, t].
            y: (N,) labels.
            state: how far the training is.

        Returns:
            (N, C, H, W), no gradient.
        """

    def sample_interval(self, random: StepRandom) -> tuple[Tensor, Tensor]:  # (N,), (N,) float64
        """t and d of each sample; d = 0 for those that learn flow matching."""
        ends = [logit_normal(random.uniform(name), self.mean, self.std) for name in ("t", "r")]
        first, second = torch.stack(ends).amax(dim=0), torch.stack(ends).amin(dim=0)
        jumps = random.uniform("jump") < self.share
        return torch.where(jumps, first, ends[0]), torch.where(jumps, first - second, 0.0)

    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """The guided velocity for d = 0 and `mean_velocity` for d > 0, see `FlowObjective.targets`."""
        t, d = (value.to(x0.dtype) for value in self.sample_interval(random.on_cpu))
        rows = (d > 0).nonzero()[:, 0].to(x0.device, non_blocking=True)
        t, d = (value.to(x0.device, non_blocking=True) for value in (t, d))
        noise = random.normal("noise", x0.shape[1:]).to(x0)
        y = drop_labels(y, random, self.label_drop, network.num_classes)
        x_t = self.process.x_t(x0, noise, t)
        w = self.scales(network, y, random)
        v = self.guided_target(network, x_t, self.process.target(x0, noise, t), t, y, w)
        called = called_rows(rows)
        if len(called) == 0:
            return Targets(x_t, t, y, v, d, w)
        given = with_scale(network, None if w is None else w[called])
        learned = self.mean_velocity(given, *(value[called] for value in (x_t, v, t, d, y)), state)
        return Targets(x_t, t, y, v.index_copy(0, rows, learned[: len(rows)]), d, w)

    def scales(self, network: Network, y: Tensor, random: StepRandom) -> Tensor | None:  # (N,)
        """The guidance scale w that the network is given with each sample; None = it has no such input.

        Args:
            network: u.
            y: (N,) labels, dropped ones replaced by the null class.
            random: random numbers of these samples at this step.
        """
        return None

    @torch.no_grad()
    def guided_target(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, y: Tensor, w: Tensor | None = None
    ) -> Tensor:
        """w v + (1 - w) u(x_t, t, 0 | null class) for samples with a class (arXiv 2505.13447, section 4.2).

        Args:
            network: u.
            x_t: (N, C, H, W) point at t.
            v: (N, C, H, W) velocity of the path at x_t.
            t: (N,) time of x_t.
            y: (N,) labels, dropped ones replaced by the null class.
            w: (N,) guidance scales, where the network is given them: None here, and w is `guidance`.

        Returns:
            (N, C, H, W).
        """
        if self.guidance == 1:
            return v
        rows = (y != network.num_classes).nonzero()[:, 0]  # waits for the device: images without a class may be in y
        called = called_rows(rows)
        if len(called) == 0:
            return v
        null = torch.full_like(y[called], network.num_classes)
        unconditional = self.process.velocity(network, x_t[called], t[called], null)[: len(rows)]
        return v.index_copy(0, rows, guide(v[rows], unconditional, self.guidance, form="mixture"))

    def weights(self, mse: Tensor, targets: Targets, state: State) -> Tensor:  # (N,)
        """(e + eps)^-power / alpha for the error e = mse / alpha^2 of each sample, see `FlowObjective.weights`."""
        scale = torch.where(targets.d > 0, self.scale(state), 1.0)
        return (mse.detach() / scale**2 + self.eps) ** -self.power / scale

    def two_parts(
        self, network: Network, x_t: Tensor, v: Tensor, t: Tensor, d: Tensor, y: Tensor, alpha: float
    ) -> Tensor:
        """alpha v + (1 - alpha) u(x_s, s, (1 - alpha) d): by v to s = t - alpha d, and from there by u.

        Args:
            alpha: the first part of the step, in (0, 1].
            network, x_t, v, t, d, y: see `mean_velocity`.

        Returns:
            (N, C, H, W), no gradient.
        """
        with torch.no_grad():
            x_s = x_t - expanded(alpha * d, x_t) * v
            rest = self.process.velocity(network, x_s, t - alpha * d, y, (1 - alpha) * d)
        return alpha * v + (1 - alpha) * rest
