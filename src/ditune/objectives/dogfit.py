"""DogFit (Bahram et al. 2025, arXiv 2508.05685): guidance away from the pretrained network, learned in training.

The target eps becomes eps + (w - 1) sg(eps_theta(x_t, t, c) - eps_base(x_t, t, null class)), so that sampling needs one
network evaluation where domain guidance (arXiv 2504.01521) needs two. The choices are those of the authors' code: the
base term is the pretrained network's null class, and theta in sg(.) is the EMA. Ours: a sample whose label was dropped
keeps the plain target, and the learned variance is that of the plain target.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ditune.errors import UserError, require
from ditune.objectives.base import Network, Objective, State
from ditune.objectives.diffusion import GaussianDiffusion
from ditune.objectives.transfer import Changed, Given, Transfer
from ditune.rng import StepRandom

TARGETS = ("ema", "live")


class DogFit(Transfer):
    """Any objective whose target is moved by the guided difference of network and base.

    Predictions of epsilon, x_0, v or a velocity are linear in each other at a fixed x_t, so the same difference of raw
    outputs serves all of them. It is subtracted from the prediction, which has the gradient of an addition to the
    target.

    Args:
        objective: the wrapped objective.
        w: guidance scale, at least 1. At 1 training is that of the wrapped objective, to the bit.
        start: late start, the share of the training before which no target is moved, in [0, 1].
        cutoff: part of the process above which no target is moved, in (0, 1], 0 = data and 1 = noise; 1 = none.
        target: network of the guided term: 'ema', or 'live', the network in training.
        control: the network is also given w, uniform in [1, w] for each sample and 1 where no target is moved. Sampling
            chooses it by `sampler.guidance_input`.

    Raises:
        UserError: a number out of range, an unknown name, or a wrapped objective without a squared error.
    """

    def __init__(
        self,
        objective: Objective,
        w: float = 1.5,
        start: float = 0.0,
        cutoff: float = 1.0,
        target: str = "ema",
        control: bool = False,
    ):
        super().__init__(objective)
        require(w >= 1, "transfer.w", w, "Set it to 1 or more.")
        require(0 <= start <= 1, "transfer.start", start, "Set it between 0 and 1.")
        require(0 < cutoff <= 1, "transfer.cutoff", cutoff, "Set it above 0 and at most to 1.")
        require(target in TARGETS, "transfer.target", target, f"Choose one of {', '.join(TARGETS)}.")
        if isinstance(objective, GaussianDiffusion) and objective.loss_name == "kl":
            raise UserError("transfer=dogfit moves the target of a squared error, and objective.loss=kl has none.")
        self.w, self.start, self.cutoff, self.target, self.control = w, start, cutoff, target, control

    @property
    def scheduled(self) -> bool:
        """Whether the late start depends on the length of the training."""
        return self.start > 0

    @property
    def needs_base(self) -> bool:
        """Whether any target is moved."""
        return self.w != 1

    @property
    def needs_null_class(self) -> bool:
        """The base's term has the null class."""
        return self.needs_base or self.objective.needs_null_class

    @property
    def inputs(self) -> dict[str, bool]:
        """The wrapped objective's, and w."""
        return self.objective.inputs | ({"guided": True} if self.control else {})

    def given(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Given:
        """The network, whose prediction is moved against the target."""
        if self.w == 1 or state.step < self.start * state.max_steps:
            return Given(network, batch, random)
        theta = state.ema if self.target == "ema" else network
        scale = 1 + (self.w - 1) * random.uniform("w") if self.control else torch.full((len(batch[1]),), self.w)

        def call(x: Tensor, t: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
            moved = (y != network.num_classes) & (self.process.part(t) <= self.cutoff)
            w = torch.where(moved, scale.to(x), 1.0)  # (N,)
            offset = self.offset(theta, state.base, x, t, y, w, network.num_classes)  # (N, C, H, W)
            torch.clear_autocast_cache()  # of weights that were cast without a gradient, see flow_base.py
            output = network(x, t, y, *inputs, **({"w": w} if self.control else {}))  # (N, C or 2C, H, W)
            return torch.cat([output[:, : x.shape[1]] - offset, output[:, x.shape[1] :]], dim=1)

        return Given(Changed(network, call), batch, random)

    @torch.no_grad()
    def offset(
        self, theta: Callable, base: Callable, x: Tensor, t: Tensor, y: Tensor, w: Tensor, null_class: int
    ) -> Tensor:
        """(w - 1) (theta(x, t, y) - base(x, t, null class)) of the predictions.

        Args:
            theta, base: (x, network time, y) -> raw output.
            x: (N, C, H, W) input of the network.
            t: (N,) time, in the network's unit.
            y: (N,) labels.
            w: (N,) guidance scales; neither network runs for samples whose scale is 1.
            null_class: label of the null class.

        Returns:
            (N, C, H, W), zero where w is 1.
        """
        offset, rows = torch.zeros_like(x), (w != 1).nonzero()[:, 0]
        if len(rows) == 0:
            return offset
        x_t, time = x[rows], t[rows]
        guided = theta(x_t, time, y[rows])[:, : x.shape[1]].to(x.dtype)
        unconditional = base(x_t, time, torch.full_like(y[rows], null_class))[:, : x.shape[1]].to(x.dtype)
        return offset.index_copy(0, rows, (w[rows] - 1).view(-1, 1, 1, 1) * (guided - unconditional))
