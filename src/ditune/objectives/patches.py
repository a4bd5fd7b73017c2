"""Patch training (Wang et al. 2023, arXiv 2304.12526): most steps see windows of the images, and cost fewer tokens.

The paper tells its U-Net where a window lies by two input channels. A DiT has a position table: a window keeps its own
rows of it, which needs no channel and fits any pretrained network. The size of the windows shows in the number of
tokens. Attention over a window alone is new to a pretrained network, so the method is for training from scratch and for
full fine-tuning.
"""

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Loss, Network, Objective, State
from ditune.objectives.transfer import Changed, Given, Transfer
from ditune.rng import StepRandom

# Sides of the windows, as divisors of the grid's side, with their shares of the steps that see windows (eq. 5).
SIZES = {"half": {2: 1.0}, "half_quarter": {4: 2 / 5, 2: 3 / 5}}
SCHEDULES = ("stochastic", "progressive")


class Patches(Transfer):
    """Any objective of one target, on windows of the token grid in a part of the steps.

    The size of the windows is a function of (seed, step), the same on all ranks; their places differ by image. A step
    has as many images as without windows, where the paper's has more of them, so it is cheaper instead.

    Args:
        objective: the wrapped objective.
        share: p, share of the steps that see whole images, in [0, 1]; 0.5 in the paper. At 1 training is that of the
            wrapped objective, to the bit.
        sizes: 'half' for windows of half of the side, as the authors' code on latents of side 32; 'half_quarter' for
            quarters too, in 2 of 5 of these steps.
        schedule: 'stochastic' chooses the size anew in every step; 'progressive' goes from the smallest to the largest,
            with the same shares.
        by_area: weight the loss by the window's share of the image, as the authors' code does with its sum over
            pixels. By default a window counts as an image.

    Raises:
        UserError: `share` is out of range, an unknown name, or an objective of several targets.
    """

    group = "patches"

    def __init__(
        self,
        objective: Objective,
        share: float = 0.5,
        sizes: str = "half",
        schedule: str = "stochastic",
        by_area: bool = False,
    ):
        super().__init__(objective)
        require(0 <= share <= 1, "patches.share", share, "Set it between 0 and 1.")
        require(sizes in SIZES, "patches.sizes", sizes, f"Choose one of {', '.join(SIZES)}.")
        require(schedule in SCHEDULES, "patches.schedule", schedule, f"Choose one of {', '.join(SCHEDULES)}.")
        self.share, self.sizes, self.schedule, self.by_area = share, sizes, schedule, by_area

    @property
    def scheduled(self) -> bool:
        """Whether the size at a step depends on the length of the training."""
        return self.schedule == "progressive"

    @property
    def probabilities(self) -> dict[int, float]:
        """Share of the steps by the divisor of the grid's side, from the smallest windows to whole images (eq. 5)."""
        windows = {divisor: (1 - self.share) * part for divisor, part in SIZES[self.sizes].items()}
        return windows | {1: self.share}

    @property
    def token_share(self) -> float:
        """Tokens of a mean step, relative to those of whole images; grids of a side that 4 divides."""
        return sum(p / divisor**2 for divisor, p in self.probabilities.items())

    @property
    def largest(self) -> Objective:
        """The wrapped objective, whose step is the most expensive one."""
        return self.objective

    def divisor(self, u: float) -> int:
        """Of the grid's side, at the quantile u in [0, 1) of the sizes."""
        total = 0.0
        for divisor, probability in self.probabilities.items():
            total += probability
            if u < total:
                return divisor
        return 1

    def size(self, side: int, random: StepRandom, state: State) -> int:
        """Side of this step's windows, in tokens; `side` is that of the grid."""
        progress = state.step / state.max_steps
        return side // self.divisor(progress if self.scheduled else random.shared("patch_size"))

    def given(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Given:
        """Windows of the images, and the network with these rows of its position table."""
        (x0, y), p = batch, network.patch_size
        side = x0.shape[-1] // p
        size = self.size(side, random, state)
        if size == side:
            return Given(network, batch, random)
        row, column = (random.integers(name, side - size + 1).to(x0.device) for name in ("patch_row", "patch_column"))
        rows, columns = spread(row, size), spread(column, size)  # (N, s) each
        window = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)  # (N, s * s)

        def call(*inputs: Tensor, **more: Tensor) -> Tensor:
            return network(*inputs, **more, window=window)

        return Given(Changed(network, call), (crop(x0, row * p, column * p, size * p), y), random)

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Loss:
        """Loss of the wrapped objective on windows; the part 'tokens' is the number of tokens of an image."""
        side = batch[0].shape[-1] // network.patch_size
        size = self.size(side, random, state)
        loss = super().loss(network, batch, random, state)
        parts = loss.parts | {"tokens": torch.full_like(loss.parts["loss"], size**2)}
        if not self.by_area or size == side:
            return loss._replace(parts=parts)
        area = (size / side) ** 2
        return loss._replace(total=area * loss.total, parts=parts | {"loss": area * loss.parts["loss"]})


def spread(first: Tensor, size: int) -> Tensor:  # (N,) -> (N, size)
    """The `size` integers from each of `first` on."""
    return first[:, None] + torch.arange(size, device=first.device)


def crop(x: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:  # (N, C, H, W) -> (N, C, size, size)
    """Squares of images.

    Args:
        x: (N, C, H, W).
        row: (N,) int64, the first row of each square.
        column: (N,) int64, the first column.
        size: side of the squares.
    """
    images = torch.arange(len(x), device=x.device)[:, None, None]
    return x[images, :, spread(row, size)[:, :, None], spread(column, size)[:, None, :]].permute(0, 3, 1, 2)
