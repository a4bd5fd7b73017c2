"""Flow matching (Lipman et al. 2022, arXiv 2210.02747; as "rectified flow" Liu et al. 2022, arXiv 2209.03003)."""

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Draws, Network, State, drop_labels
from ditune.objectives.flow_base import FlowObjective, Targets, logit_normal
from ditune.objectives.weighting import WEIGHTS, flow_weights
from ditune.processes import FlowProcess, shifted

TIMES = ("uniform", "logit_normal")


class FlowMatching(FlowObjective):
    """The network learns the velocity epsilon - x_0 of the straight path between a picture and noise.

    Args:
        process: the flow.
        times: distribution of t: 'uniform', or 'logit_normal': sigmoid(mean + std z) (arXiv 2403.03206).
        mean, std: of 'logit_normal'.
        stratified: the global batch divides the distribution into as many equal parts and has one time in each.
        shift: time shift of arXiv 2403.03206: above 1 more of the times stand near the noise; 1 = none.
        weight: of the squared error: 'none', or 'x0', 'epsilon', 'truncated_snr', 'min_snr' of arXiv 2303.09556.
        gamma: upper limit of the signal-to-noise ratio in 'min_snr'.
        label_drop: share of labels replaced by the null class, in [0, 1].

    Raises:
        UserError: unknown names, or a number out of range.
    """

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
    ):
        super().__init__(process, label_drop)
        if times not in TIMES:
            raise UserError(f"Flow matching knows no times {times!r}. Choose one of {', '.join(TIMES)}.")
        if weight not in ("none", *WEIGHTS):
            known = ", ".join(("none", *WEIGHTS))
            raise UserError(f"Flow matching knows no weight {weight!r}. Choose one of {known}.")
        if std <= 0 or shift <= 0 or gamma <= 0:
            raise UserError("Flow matching cannot have such numbers. Set std, shift and gamma above 0.")
        self.weight, self.gamma = weight, gamma
        self.times, self.mean, self.std, self.stratified, self.shift = times, mean, std, stratified, shift

    def draw_times(self, draws: Draws, batch_size: int) -> Tensor:  # (N,) float64
        """Every distribution is drawn through its inverse, so that a stratum of [0, 1) is one of the times."""
        u = draws.uniform("t")
        if self.stratified:
            u = (torch.tensor(draws.positions, device=u.device) + u) / batch_size
        if self.times == "logit_normal":
            u = logit_normal(u, self.mean, self.std)
        return shifted(u, self.shift)

    def weights(self, mse: Tensor, targets: Targets, state: State) -> Tensor:
        if self.weight == "none":
            return super().weights(mse, targets, state)
        return flow_weights(self.weight, targets.t, self.gamma).to(mse)

    def targets(self, network: Network, x0: Tensor, y: Tensor, draws: Draws, state: State) -> Targets:
        t, noise = self.draw_times(draws, state.batch_size).to(x0), draws.normal("noise", x0.shape[1:]).to(x0)
        y = drop_labels(y, draws, self.label_drop, network.num_classes)
        return Targets(self.process.x_t(x0, noise, t), t, y, self.process.target(x0, noise))
