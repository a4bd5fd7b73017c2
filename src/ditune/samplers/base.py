"""The interface of samplers: from noise to data, step by step."""

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
    """Base class of samplers. A subclass implements `walk`, and `check` if it cannot take every number of steps."""

    kind: ClassVar[str]  # name in stored evaluation protocols; the class may be renamed
    parameters: ClassVar[tuple[str, ...]] = ()  # attributes that change the images, in the order of `settings`
    process: ClassVar[type[Process]]  # the kind of process that it samples from
    calls_per_step: ClassVar[int] = 1  # network calls, at several times if there are several

    def settings(self) -> dict[str, Any]:
        """Names and values of `parameters`, a part of every stored evaluation protocol."""
        return {name: getattr(self, name) for name in self.parameters}

    def check(self, process: Process) -> None:  # noqa: B027 - most take any number
        """Refuse a process whose steps the sampler cannot take.

        Args:
            process: with the number of steps to be taken.

        Raises:
            UserError: the sampler cannot take them.
        """

    @abstractmethod
    def walk(self, model_fn: ModelFn, process: Process, x: Tensor, noise: NoiseFn) -> Iterator[Step]:
        """Go from noise to data, and yield (time at its beginning, x after it, predicted x_0) of every step.

        Args:
            model_fn, process, x, noise: see `__call__`.
        """

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
            model_fn: (x, time) -> raw output, or (x, time, step size) -> raw output for step-conditioned networks.
            process: with the number of steps to be taken.
            x: (N, C, H, W) standard normal noise.
            noise: returns (N, C, H, W) standard normal noise. Random samplers call it at every step but the last.
            on_step: called after every step with (time at its beginning, x, predicted x_0).

        Returns:
            (N, C, H, W) data.
        """
        for step in self.walk(model_fn, process, x, noise):
            x = step[1]
            if on_step is not None:
                on_step(*step)
        return x
