"""What all samplers share: from noise to data, step by step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditune.processes import Process
from ditune.samplers.guidance import ModelFn

NoiseFn = Callable[[], Tensor]
Step = tuple[float, Tensor, Tensor]  # time at its beginning, x after it, predicted x_0


class Sampler(ABC):
    """Base of samplers; one of them implements `walk`, and `check` where not every number of steps will do."""

    kind: ClassVar[str]  # in the protocols of stored values; the class may be renamed
    parameters: ClassVar[tuple[str, ...]] = ()  # attributes that decide how images look, in the order of `settings`
    process: ClassVar[type[Process]]  # the kind that it draws from

    def settings(self) -> dict[str, Any]:
        """Names and values of its parameters, a part of every protocol."""
        return {name: getattr(self, name) for name in self.parameters}

    def check(self, process: Process) -> None:  # noqa: B027 - most take any number
        """Whether it can take the process's steps.

        Raises:
            UserError: it cannot.
        """

    @abstractmethod
    def walk(self, model_fn: ModelFn, process: Process, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Go from noise to data; gives every step that was taken. Arguments as `__call__`'s."""

    @torch.inference_mode()
    def __call__(
        self,
        model_fn: ModelFn,
        process: Process,
        x: Tensor,
        noise: NoiseFn,
        on_step: Callable[[float, Tensor, Tensor], None] | None = None,
    ) -> Tensor:  # (N, C, H, W)
        """Go from noise to data.

        Args:
            model_fn: (x, time of the network, and for those that are told steps their length) -> raw output.
            process: its steps are the steps taken.
            x: (N, C, H, W) standard normal noise.
            noise: gives (N, C, H, W) standard normal noise; random samplers call it, but not at the last step.
            on_step: called after every step with (time at its beginning, x, predicted x_0).
        """
        for step in self.walk(model_fn, process, x, noise):
            x = step[1]
            if on_step is not None:
                on_step(*step)
        return x
