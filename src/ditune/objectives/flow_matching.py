"""Flow matching (Lipman et al. 2022, arXiv 2210.02747; as "rectified flow" Liu et al. 2022, arXiv 2209.03003)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, State, checked_interval, drop_labels
from ditune.objectives.flow_base import FlowObjective, Targets, logit_normal
from ditune.objectives.weighting import WEIGHTS, flow_weights
from ditune.processes import FlowProcess, shifted
from ditune.rng import StepRandom

TIMES = ("uniform", "logit_normal")


class FlowMatching(FlowObjective):
    """The network learns the velocity epsilon - x_0 of the straight path from an image to noise.

    Args:
        process: the flow.
        times: distribution of t: 'uniform', or 'logit_normal', sigmoid(mean + std z) (arXiv 2403.03206).
        mean, std: of 'logit_normal'.
        stratified: the distribution is divided into one part of equal probability per sample of the global batch, and
            each sample takes its time from its own part.
        shift: time shift (arXiv 2403.03206). Above 1, more times are near the noise; 1 = none.
        weight: of the squared error: 'none', or 'x0', 'epsilon', 'truncated_snr', 'min_snr' (arXiv 2303.09556).
        gamma: upper limit of the signal-to-noise ratio in 'min_snr'.
        label_drop: share of labels that are replaced by the null class, in [0, 1].
        interval: quantiles [low, high] of t that are trained (after eDiff-I, arXiv 2211.01324); None = all.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    any_path = True

    def __init__(
        self,
        process: FlowProcess,
        times: str = "uniform",
        mean: float = 0.0,
        std: float = 1.0,
        stratified: bool = False,
        shift: float = 1.0,
        weight: str = "none",
        gamma: float = 5.0,
        label_drop: float = 0.1,
        interval: Sequence[float] | None = None,
    ):
        super().__init__(process, label_drop)
        known = ("none", *WEIGHTS)
        require(times in TIMES, "objective.times", times, f"Choose one of {', '.join(TIMES)}.")
        require(weight in known, "objective.weight", weight, f"Choose one of {', '.join(known)}.")
        require(std > 0, "objective.std", std, "Set it above 0.")
        require(shift > 0, "objective.shift", shift, "Set it above 0.")
        require(gamma > 0, "objective.gamma", gamma, "Set it above 0.")
        self.weight, self.gamma, self.interval = weight, gamma, checked_interval(interval)
        self.times, self.mean, self.std, self.stratified, self.shift = times, mean, std, stratified, shift

    def sample_times(self, random: StepRandom, batch_size: int) -> Tensor:  # (N,) float64
        """Times in [0, 1] by the inverse of their distribution, so that a part of [0, 1) is a part of the times.

        Args:
            random: random numbers of these samples; the purpose is "t".
            batch_size: samples of the global batch, the number of parts of `stratified`.
        """
        u = random.uniform("t")
        if self.stratified:
            u = (torch.tensor(random.positions, device=u.device) + u) / batch_size
        if self.interval is not None:
            low, high = self.interval
            u = low + (high - low) * u
        return self.time_of(u)

    def time_of(self, u: Tensor) -> Tensor:  # (N,) -> (N,)
        """The quantiles u in [0, 1) of t."""
        if self.times == "logit_normal":
            u = logit_normal(u, self.mean, self.std)
        return shifted(u, self.shift)

    @property
    def part(self) -> tuple[float, float] | None:
        """The times between the quantiles, see `Objective.part`; a part that ends at 0 or 1 does so to the bit."""
        if self.interval is None:
            return None
        low, high = self.time_of(torch.tensor(self.interval, dtype=torch.float64)).tolist()
        return (low if self.interval[0] > 0 else 0.0), (high if self.interval[1] < 1 else 1.0)

    def weights(self, mse: Tensor, targets: Targets, state: State) -> Tensor:
        """The configured `weight` at each sample's time, see `FlowObjective.weights`."""
        if self.weight == "none":
            return super().weights(mse, targets, state)
        return flow_weights(self.weight, targets.t, self.gamma).to(mse)

    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """epsilon - x_0 at sampled times, see `FlowObjective.targets`."""
        t = self.sample_times(random.on_cpu, state.batch_size).to(x0.dtype).to(x0.device, non_blocking=True)
        noise = random.normal("noise", x0.shape[1:]).to(x0)
        y = drop_labels(y, random, self.label_drop, network.num_classes)
        return Targets(self.process.x_t(x0, noise, t), t, y, self.process.target(x0, noise, t))
