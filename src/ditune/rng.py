"""Random numbers as functions of their purpose: stopping, resuming and more ranks change nothing.

A number used in training depends on (seed, purpose, step, position in the global batch). A number used in sampling
depends on (seed, image index). Nothing here moves torch's global generator.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64

Request = tuple[str, tuple[int, ...] | None]  # purpose, and shape of one sample; None = a uniform number


def mix(*numbers: int) -> int:
    """Hash integers to 64 bits by chaining splitmix64 (Steele, Lea & Flood 2014).

    Args:
        *numbers: any integers, of which the lowest 64 bits count. Their order matters.

    Returns:
        An integer in [0, 2^64), the same for the same numbers on every machine.
    """
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + _STEP) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def mix_each(*numbers: int, last: Sequence[int]) -> np.ndarray:
    """`mix(*numbers, value)` of many values at once.

    Args:
        *numbers: integers that all of them share.
        last: (N,) integers in [-2^63, 2^63).

    Returns:
        (N,) uint64.
    """
    state = np.asarray(last, dtype=np.int64).view(np.uint64) + np.uint64((mix(*numbers) + _STEP) & _MASK)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
    return state ^ (state >> np.uint64(31))


def generator(*numbers: int) -> torch.Generator:
    """A new CPU generator, seeded by `mix(*numbers)`."""
    return torch.Generator().manual_seed(mix(*numbers) >> 1)  # torch takes seeds below 2^63


class StepRandom:
    """The random numbers of one micro-batch.

    A number is a function of (seed, purpose, step, position). Rank and micro-step only select the positions, so every
    split of the global batch sees the same numbers. The purposes are strings; they are part of every stored result.

    Args:
        seed: the run's seed.
        step: optimizer step, from 0.
        positions: (N,) position of each sample of this micro-batch in the global batch of the step.
        device: where the numbers are returned. They are always made on the CPU, so every device sees the same.
        made: numbers that have been made already, as `make` makes them; what is not there is made when asked for.

    Attributes:
        asked: what has been asked for so far, in this order.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        positions: Sequence[int],
        device: torch.device | str = "cpu",
        made: Mapping[Request, Tensor] | None = None,
    ):
        self.seed, self.step, self.device = seed, step, device
        self.positions = [int(p) for p in positions]
        self.made, self.asked = made or {}, dict[Request, None]()

    @property
    def on_cpu(self) -> "StepRandom":
        """The same numbers on the CPU, for decisions that must not wait for a device."""
        other = copy(self)  # of the same class, which may change some of the numbers
        other.device = "cpu"
        return other

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers.

        Args:
            purpose: what they are for, such as "noise".
            shape: of one sample, without the batch.

        Returns:
            (N, *shape) float32.
        """
        return self._numbers((purpose, tuple(shape)))

    def uniform(self, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), (N,) float64: the top 53 bits of the hash of `purpose` and position."""
        return self._numbers((purpose, None))

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform integers in [0, high), (N,) int64."""
        return (self.uniform(purpose) * high).long()

    def shared(self, purpose: str) -> float:
        """One uniform number in [0, 1) for the whole step: the same for all positions, so for all ranks."""
        return (mix(self.seed, crc32(purpose.encode()), self.step) >> 11) * 2.0**-53

    def _numbers(self, request: Request) -> Tensor:
        self.asked[request] = None
        values = self.made.get(request)
        return (self.make(request) if values is None else values).to(self.device, non_blocking=True)

    def make(self, request: Request, pinned: bool = False) -> Tensor:
        """The numbers of a request, on the CPU.

        Args:
            request: see `Request`.
            pinned: whether they lie in memory that a GPU can read by itself.
        """
        purpose, shape = request
        hashes = mix_each(self.seed, crc32(purpose.encode()), self.step, last=self.positions)
        if shape is None:
            values = torch.from_numpy((hashes >> np.uint64(11)) * 2.0**-53)
            return values.pin_memory() if pinned else values
        values, own = torch.empty(len(hashes), *shape, pin_memory=pinned), torch.Generator()
        for row, number in zip(values, (hashes >> np.uint64(1)).tolist(), strict=True):
            row.normal_(generator=own.manual_seed(number))  # torch takes seeds below 2^63
        return values


Draws = StepRandom  # its earlier name


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make initial values inside of the block a function of the seed.

    Torch's global CPU generator is put back afterwards, so nothing outside of the block changes.

    Args:
        seed: any integer that `torch.manual_seed` accepts.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
