"""Noise-awareness guidance (arXiv 2510.12497, ICLR 2026): the network also learns to predict without its time."""

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, Objective, State
from ditune.objectives.transfer import Changed, Given, Transfer
from ditune.rng import StepRandom


class NoiseAwareness(Transfer):
    """Any objective, with a share of the samples whose time the network is not given.

    One trained vector stands for the embedding of a missing time. Sampling then pushes the prediction away from the
    one without the time, see `ditune.samplers.guidance.guided`.

    Args:
        objective: the wrapped objective.
        drop: share of the samples whose time is dropped, in [0, 1]; 0.1 to 0.2 in the paper. At 0 training is that of
            the wrapped objective, to the bit.

    Raises:
        UserError: `drop` is out of range.
    """

    def __init__(self, objective: Objective, drop: float = 0.1):
        require(0 <= drop <= 1, "transfer.drop", drop, "Set it between 0 and 1.")
        super().__init__(objective)
        self.drop = drop

    @property
    def inputs(self) -> dict[str, bool]:
        """The wrapped objective's, and a time that may be missing."""
        return self.objective.inputs | ({"untimed": True} if self.drop else {})

    def given(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Given:
        """The network, which is given NaN as the time of the dropped samples."""
        if not self.drop:
            return Given(network, batch, random)
        dropped = random.uniform("drop_time") < self.drop

        def call(x: Tensor, t: Tensor, *inputs: Tensor, **more: Tensor) -> Tensor:
            return network(x, torch.where(dropped.to(t.device), torch.nan, t.float()), *inputs, **more)

        return Given(Changed(network, call), batch, random)
