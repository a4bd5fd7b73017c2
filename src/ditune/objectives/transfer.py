"""What the objectives for transfer share: each wraps another objective, and changes what that one is given."""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Loss, Network, Objective, State
from ditune.objectives.diffusion import GaussianDiffusion
from ditune.objectives.flow_matching import FlowMatching
from ditune.processes import Process
from ditune.rng import StepRandom


class Given(NamedTuple):
    """What the wrapped objective is given in place of its own arguments, see `Objective.loss`."""

    network: Network
    batch: tuple[Tensor, Tensor]
    random: StepRandom


class Transfer(Objective):
    """An objective around another one. A subclass implements `given`.

    Args:
        objective: a `GaussianDiffusion` or a `FlowMatching`: the network learns one target at one time there.

    Raises:
        UserError: the objective is another one.
    """

    group: ClassVar[str] = "transfer"  # of the config, for messages
    neutral: ClassVar[str] = "none"  # its value without this objective

    def __init__(self, objective: Objective):
        if not isinstance(objective, GaussianDiffusion | FlowMatching):
            raise UserError(
                f"{self.group}= cannot be used with {type(objective).__name__}, whose target has other networks or "
                f"times. Set objective=diffusion, diffusion_v or flow_matching, or "
                f"{self.group}={self.neutral}."
            )
        self.objective, self.any_path = objective, objective.any_path

    @property
    def process(self) -> Process:
        """Of the wrapped objective."""
        return self.objective.process

    @process.setter
    def process(self, process: Process) -> None:
        self.objective.process = process

    @property
    def part(self) -> tuple[float, float] | None:
        """Of the wrapped objective."""
        return self.objective.part

    @property
    def needs_null_class(self) -> bool:
        """Whether the network's label table must have a null class."""
        return self.objective.needs_null_class

    @abstractmethod
    def given(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Given:
        """What the wrapped objective is given, see `Objective.loss`."""

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Loss:
        """Loss of the wrapped objective on what `given` makes of its arguments."""
        return self.objective.loss(*self.given(network, batch, random, state), state)

    def denoising(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom) -> Tensor:  # (N,)
        """That of the wrapped objective."""
        return self.objective.denoising(network, batch, random)


class Changed:
    """A network whose calls are changed, with the null class of the original.

    Args:
        network: the network.
        call: called in its place, with the same arguments.
    """

    def __init__(self, network: Network, call: Network):
        self.num_classes, self.call = network.num_classes, call

    def __call__(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        """See `Network`."""
        return self.call(*inputs, **more)
