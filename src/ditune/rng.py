"""Random numbers as functions of their purpose: stopping, resuming and more ranks change nothing.

A number used in training depends on (seed, purpose, step, position in the global batch). A number used in sampling
depends on (seed, image index). Nothing here moves torch's global generator.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from zlib import crc32

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Hash integers to 64 bits by chaining splitmix64 (Steele, Lea & Flood 2014).

    Args:
        *numbers: any integers, of which the lowest 64 bits count. Their order matters.

    Returns:
        An integer in [0, 2^64), the same for the same numbers on every machine.
    """
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


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
    """

    def __init__(self, seed: int, step: int, positions: Sequence[int], device: torch.device | str = "cpu"):
        self.seed, self.step, self.device = seed, step, device
        self.positions = [int(p) for p in positions]

    def _hashes(self, purpose: str) -> list[int]:
        return [mix(self.seed, crc32(purpose.encode()), self.step, position) for position in self.positions]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers.

        Args:
            purpose: what they are for, such as "noise".
            shape: of one sample, without the batch.

        Returns:
            (N, *shape) float32.
        """
        noise = torch.empty(len(self.positions), *shape)
        for row, value in zip(noise, self._hashes(purpose), strict=True):
            row.normal_(generator=torch.Generator().manual_seed(value >> 1))
        return noise.to(self.device)

    def uniform(self, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), (N,) float64: the top 53 bits of the hash of `purpose` and position."""
        values = [(value >> 11) * 2.0**-53 for value in self._hashes(purpose)]
        return torch.tensor(values, dtype=torch.float64).to(self.device)

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform integers in [0, high), (N,) int64."""
        return (self.uniform(purpose) * high).long()


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
