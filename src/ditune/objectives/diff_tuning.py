"""Diff-Tuning (Zhong et al. 2024, arXiv 2406.00773): new images teach mostly near the noise, the base's own near data.

A pretrained network transfers best near the data, where it removes the last noise. So new images get times of density
t^k, and images that the pretrained network has generated itself get (1 - t)^k, with the null class. The authors' code
gives the whole timestep i = 1 ... T the probability i^k / sum; here times are continuous in [0, 1), and a timestep is
their floor, which differs by less than one timestep.
"""

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, Objective, State
from ditune.objectives.transfer import Given, Transfer
from ditune.rng import StepRandom


class DiffTuning(Transfer):
    """Any objective, with other densities of the time and a share of the base's own images.

    Args:
        objective: the wrapped objective; its own quantile of the time is skewed.
        k: power of both densities, at least 0; 1 in the authors' code. At 0 the times are those of the wrapped
            objective, to the bit.
        share: of the samples that are replaced by images of the base, in [0, 1]; 0.2 in the authors' code.
        n: number of images that the base generates before the first step.

    Raises:
        UserError: a number out of range.
    """

    def __init__(self, objective: Objective, k: float = 1.0, share: float = 0.2, n: int = 256):
        super().__init__(objective)
        require(k >= 0, "transfer.k", k, "Set it to 0 or more.")
        require(0 <= share <= 1, "transfer.share", share, "Set it between 0 and 1.")
        require(n >= 1, "transfer.n", n, "Set it to 1 or more.")
        self.k, self.share, self.n = k, share, n
        self.samples: Tensor | None = None  # (n, C, H, W) of the base, on the CPU

    @property
    def needs_base(self) -> bool:
        """Whether the base's own images are used."""
        return self.share > 0

    @property
    def needs_null_class(self) -> bool:
        """The base's own images have the null class."""
        return self.needs_base or self.objective.needs_null_class

    def given(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Given:
        """A share of the base's images among the batch, and skewed times."""
        retained = random.uniform("retain") < self.share  # (N,)
        (x0, y), rows = batch, retained.nonzero()[:, 0]
        if len(rows) and self.samples is not None:  # plans are made before there are any
            chosen = self.samples[random.integers("retained", len(self.samples)).cpu()].to(x0)
            x0 = torch.where(retained.to(x0.device).view(-1, 1, 1, 1), chosen, x0)
        y = torch.where(retained.to(y.device), network.num_classes, y)
        return Given(network, (x0, y), Skewed(random, self.k, retained))


class Skewed(StepRandom):
    """Random numbers whose uniform times have the density (k + 1) t^k, or (k + 1) (1 - t)^k for retained samples.

    Args:
        random: the numbers that are changed for the purpose "t", and passed on for all others.
        k: the power.
        retained: (N,) bool, the samples with the second density.
    """

    def __init__(self, random: StepRandom, k: float, retained: Tensor):
        super().__init__(random.seed, random.step, random.positions, random.device, random.made)
        self.asked = random.asked
        self.k, self.retained = k, retained

    def uniform(self, purpose: str) -> Tensor:  # (N,) float64
        """See `StepRandom.uniform`; the inverse of the density's integral t^(k + 1)."""
        u = super().uniform(purpose)
        if purpose != "t" or self.k == 0:
            return u
        power = 1 / (self.k + 1)
        return torch.where(self.retained.to(u.device), 1 - (1 - u) ** power, u**power).clamp(max=1 - 2.0**-53)
