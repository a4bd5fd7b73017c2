"""The random numbers of the next micro-batch, made while the device is busy with the one at hand."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ditune.rng import Request, StepRandom

AHEAD = ("cuda",)  # kinds of devices that compute while the CPU makes numbers


class RandomAhead:
    """Hands out the numbers of micro-batches; a thread makes those of the next one where the device is worth it.

    The numbers are functions of (seed, step, position), so nothing depends on whether they were made ahead.

    Args:
        seed: of the training.
        batch_size: global batch.
    """

    def __init__(self, seed: int, batch_size: int):
        self.seed, self.batch_size = seed, batch_size
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[list[int], Future[dict[Request, Tensor]]] | None = None  # its positions, its numbers

    def of(self, positions: Sequence[int], device: torch.device) -> StepRandom:
        """The numbers of the micro-batch at these positions of the training's stream, for a device."""
        step = positions[0] // self.batch_size
        made, (expected, future) = None, self._next or (None, None)
        if expected == list(positions):
            made, self._next = future.result(), None
        return StepRandom(self.seed, step, [p - step * self.batch_size for p in positions], device, made)

    def prepare(self, random: StepRandom, positions: Sequence[int]) -> None:
        """Begin to make the numbers of another micro-batch.

        Args:
            random: of the micro-batch at hand, after its loss: the other one is expected to ask for the same.
            positions: of the other one in the training's stream.
        """
        if torch.device(random.device).type not in AHEAD:
            return
        self._pool = self._pool or ThreadPoolExecutor(1, "random numbers")
        step, pinned = positions[0] // self.batch_size, torch.cuda.is_available()
        numbers = StepRandom(self.seed, step, [p - step * self.batch_size for p in positions])
        asked = list(random.asked)
        future = self._pool.submit(lambda: {request: numbers.make(request, pinned) for request in asked})
        self._next = list(positions), future

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = self._next = None
