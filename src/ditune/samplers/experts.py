"""Experts by time (eDiff-I, Balaji et al. 2022, arXiv 2211.01324): one of several adapters runs in each network call.

The paper trains whole networks for parts of the process. Here they are adapters of one frozen base, so that K of them
cost little memory, and a step still costs one network call. The mapping to adapters is ours.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor, nn

from ditune.errors import UserError, require
from ditune.samplers.guidance import ModelFn

Part = tuple[float, float]  # of the process, 0 = data and 1 = noise


class Switch(Protocol):
    """Adapters of one network, such as `ditune.peft.Adapters`."""

    def use(self, name: str | None) -> None:
        """Use this adapter from now on; None = the base alone."""
        ...

    def used(self, name: str | None) -> AbstractContextManager[nn.Module]:
        """Use this adapter inside of the block, then the previous one again."""
        ...


class Experts:
    """Adapters and the parts of the process where they run. Outside of all parts the base runs.

    Args:
        adapters: of the network that is sampled from.
        parts: [low, high) of each adapter, by its name; high = 1 includes the pure noise.

    Raises:
        UserError: a part is none of [0, 1], or two overlap.
    """

    def __init__(self, adapters: Switch, parts: Mapping[str, Part]):
        for name, (low, high) in parts.items():
            require(0 <= low < high <= 1, f"the part of {name}", [low, high], "Give 0 <= low < high <= 1.")
        ordered = sorted(parts.items(), key=lambda item: item[1])
        for (name, (_, end)), (other, (begin, _)) in pairwise(ordered):
            if begin < end:
                raise UserError(
                    f"The experts {name} and {other} both know the part of the process from {begin:g} to {end:g}. "
                    "Leave one of them out, or train one with another objective.interval."
                )
        self.adapters, self.parts = adapters, dict(ordered)

    @property
    def settings(self) -> dict[str, list[float]]:
        """The parts, for what is written down about images."""
        return {name: list(part) for name, part in self.parts.items()}

    def name_at(self, time: float) -> str | None:
        """The expert of a time in [0, 1], 0 = data and 1 = noise; None = the base."""
        return next((name for name, (low, high) in self.parts.items() if low <= time < high or time == high == 1), None)

    @contextmanager
    def choosing(self, model_fn: ModelFn, length: float) -> Iterator[ModelFn]:
        """The model with the adapter of each call's time; afterwards the adapter in use is what it was.

        Args:
            model_fn: of the network with these adapters; the times of a call are all equal.
            length: of the network's time, which turns it into a part of the process.
        """

        def run(x: Tensor, t: Tensor, *step: Tensor, shared_time: float | None = None) -> Tensor:
            time = _only(t) if shared_time is None else shared_time
            self.adapters.use(self.name_at(time / length))
            more: dict[str, Any] = {"shared_time": time} if getattr(model_fn, "knows_shared_time", False) else {}
            return model_fn(x, t, *step, **more)

        run.knows_shared_time = True  # see `at_time`
        with self.adapters.used(None):
            yield run


def _only(t: Tensor) -> float:
    time = t[0].item()
    if not bool((t == time).all()):
        raise ValueError(f"experts are chosen by the time of a whole batch, and this one has times {t.tolist()}")
    return time
