"""What guidance pushes away from: the unconditional branch of `guidance.guide`, where it is not the null class's own.

Each guide gives the branch as a network call of its own, so that a guided step costs two calls of N images. The
formula, its interval, channels and rescaling are those of plain guidance.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.processes import Process
from ditune.samplers.guidance import ModelFn


class Guide(ABC):
    """Base class of the guides. A subclass implements `bind`."""

    kind: ClassVar[str]  # in stored evaluation protocols
    of_base: ClassVar[bool] = False  # whether a network that is not adapted is guided by its own null class

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the images, a part of every stored evaluation protocol."""
        return {}

    @abstractmethod
    def bind(self, network: nn.Module, process: Process, y: Tensor) -> ModelFn:
        """The unconditional branch for one generation.

        Args:
            network: that is guided.
            process: of the network.
            y: (N,) labels of the images.

        Returns:
            (x, time) -> raw output, or (x, time, step size) -> raw output.

        Raises:
            UserError: the network has no such branch.
        """


class BaseGuide(Guide):
    """The null class of the base that the network was adapted from (domain guidance, arXiv 2504.01521).

    With PEFT the base is the adapted network with the adapter out; no weight is there twice but those that train in
    place. A network that is not adapted is its own base.
    """

    kind = "base"
    of_base = True
    strength = 0.0

    def bind(self, network: nn.Module, process: Process, y: Tensor) -> ModelFn:
        """See `Guide.bind`."""
        method = getattr(network, "adaptation", None)
        if method is None:
            weaker = network
        elif method.dial is None:
            raise UserError(
                f"The guide is the base of a network that {method.title} has adapted, and the base was not kept. "
                "Load it by load_run(folder, keep_base=True), or set sampler.guide=null_class."
            )
        else:
            weaker = method.dial.at(self.strength)
        called, null = process.bind(weaker), torch.full_like(y, weaker.num_classes)
        return lambda x, t, *step: called(x, t, null, *step)


class InterpolatedGuide(BaseGuide):
    """The null class of weights between the base's and the network's (arXiv 2508.00319), see `ditune.peft.dial`.

    Args:
        strength: lambda; 0 = `BaseGuide`, 1 = the network's own null class.
    """

    kind = "interpolated"

    def __init__(self, strength: float = 0.5):
        self.strength = float(strength)

    @property
    def settings(self) -> dict[str, Any]:
        """See `Guide.settings`."""
        return {"strength": self.strength}


class CheckpointGuide(Guide):
    """A weaker network, conditioned on the same class (autoguidance, arXiv 2406.02507).

    Args:
        network: in evaluation mode, of the guided network's latents and classes.
        sha256: of its file.
        process: config of the process that it was trained on.
    """

    kind = "checkpoint"

    def __init__(self, network: nn.Module, sha256: str, process: dict[str, Any]):
        self.network, self.sha256, self.process = network, sha256, process

    @property
    def settings(self) -> dict[str, Any]:
        """See `Guide.settings`."""
        return {"sha256": self.sha256}

    def bind(self, network: nn.Module, process: Process, y: Tensor) -> ModelFn:
        """See `Guide.bind`."""
        for what, theirs, ours in (
            ("number of classes", self.network.num_classes, network.num_classes),
            ("number of channels", self.network.in_channels, network.in_channels),
            ("process", self.process, process.config),
        ):
            if theirs != ours:
                raise UserError(
                    f"The guide's network has another {what} than the guided one: {theirs} and {ours}. "
                    "Set sampler.guide_checkpoint to a network of the same data and process."
                )
        called = process.bind(self.network.to(y.device))
        return lambda x, t, *step: called(x, t, y, *step)
